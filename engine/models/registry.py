"""Which family serves which architecture."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.checkpoints.architectures import about, architectures_of
from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.model_config import ModelConfig
from engine.checkpoints.task import Task
from engine.kernels.table import Backend
from engine.layers.decoder import build_decoder
from engine.layers.encoder import build_encoder
from engine.layers.encoder_weights import EncoderNames
from engine.layers.weights import DecoderTraits
from engine.models import (
    bert,
    gemma3,
    llama,
    mistral,
    mixtral,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    roberta,
    xlm_roberta,
)  # fmt: skip
from engine.models.model import Model

_DECODERS: dict[str, Callable[[ModelConfig], DecoderTraits]] = {
    "Gemma3ForCausalLM": gemma3.traits,
    "LlamaForCausalLM": llama.traits,
    "MistralForCausalLM": mistral.traits,
    "Qwen2ForCausalLM": qwen2.traits,
    "Qwen3ForCausalLM": qwen3.traits,
    "Qwen2MoeForCausalLM": qwen2_moe.traits,
    "Qwen3MoeForCausalLM": qwen3_moe.traits,
    "MixtralForCausalLM": mixtral.traits,
}
_ENCODERS: dict[str, EncoderNames] = {
    "BertModel": bert.NAMES,
    "RobertaModel": roberta.NAMES,
    "XLMRobertaModel": xlm_roberta.NAMES,
}

GENERATION = Task()


def known_architectures() -> list[str]:
    """The architectures that `build_model` accepts, in alphabetical order."""
    return sorted(name for family in (*_DECODERS, *_ENCODERS) for name in architectures_of(family))


def build_model(config: ModelConfig, task: Task = GENERATION, *, dtype: torch.dtype, backend: Backend) -> Model:
    """Allocate the model of `config.architecture` for a task, its weights unfilled (see `Model.places`).

    dtype: of weights and activations. Raises CheckpointError for an unknown architecture, and for a config or a task
    that the family cannot serve.
    """
    family = about(config.architecture).family
    if family in _ENCODERS:
        return build_encoder(config, _ENCODERS[family], task, dtype=dtype, backend=backend)
    if family not in _DECODERS:
        raise CheckpointError(
            f"unknown architecture {config.architecture!r}; known ones: {', '.join(known_architectures())}"
        )
    return build_decoder(config, _DECODERS[family](config), task, dtype=dtype, backend=backend)
