"""Which family serves which architecture."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.model_config import ModelConfig
from engine.checkpoints.task import Task
from engine.kernels.table import Backend
from engine.layers.decoder import build_decoder
from engine.layers.weights import DecoderTraits
from engine.models import llama, mistral, mixtral, qwen2, qwen2_moe, qwen3, qwen3_moe
from engine.models.model import Model

_DECODERS: dict[str, Callable[[ModelConfig], DecoderTraits]] = {
    "LlamaForCausalLM": llama.traits,
    "MistralForCausalLM": mistral.traits,
    "Qwen2ForCausalLM": qwen2.traits,
    "Qwen3ForCausalLM": qwen3.traits,
    "Qwen2MoeForCausalLM": qwen2_moe.traits,
    "Qwen3MoeForCausalLM": qwen3_moe.traits,
    "MixtralForCausalLM": mixtral.traits,
}

GENERATION = Task()


def known_architectures() -> list[str]:
    """The architectures that `build_model` accepts, in alphabetical order."""
    return sorted(_DECODERS)


def build_model(config: ModelConfig, task: Task = GENERATION, *, dtype: torch.dtype, backend: Backend) -> Model:
    """Allocate the model of `config.architecture`, its weights unfilled (see `Model.places`).

    dtype: of weights and activations. Raises CheckpointError for an unknown architecture and for a config
    that the family cannot serve.
    """
    family = _DECODERS.get(config.architecture)
    if family is None:
        raise CheckpointError(
            f"unknown architecture {config.architecture!r}; known ones: {', '.join(known_architectures())}"
        )
    return build_decoder(config, family(config), task, dtype=dtype, backend=backend)
