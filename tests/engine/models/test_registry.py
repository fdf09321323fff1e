"""What the registry accepts and refuses."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from tiny_config import CONFIG

from engine.checkpoints.architectures import ENCODERS, about
from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.model_config import EncoderConfig, RopeConfig
from engine.checkpoints.task import read_task
from engine.config import ModelSource
from engine.kernels.eager import EagerBackend
from engine.models.registry import build_model, known_architectures


def build(**changes: object) -> None:
    build_model(msgspec.structs.replace(CONFIG, **changes), dtype=torch.float32, backend=EagerBackend())


@pytest.mark.parametrize("architecture", known_architectures())
def test_known_architectures_build(architecture: str, tmp_path: Path) -> None:
    about_ = about(architecture)
    encoder = EncoderConfig(layer_norm_eps=1e-5, positions=64, first_position=0, type_vocab_size=2)
    changes = {"encoder": encoder, "hidden_act": "gelu"} if about_.family in ENCODERS else {}
    if about_.family == "Gemma3ForCausalLM":
        changes = {"hidden_act": "gelu_pytorch_tanh"}
    config = msgspec.structs.replace(CONFIG, architecture=architecture, **changes)
    task = read_task(
        ModelSource(name="x", kind="folder", path=str(tmp_path)), config, is_embedding=about_.head == "masked"
    )
    model = build_model(config, task, dtype=torch.float32, backend=EagerBackend())
    assert model.reads_whole == (about_.family in ENCODERS)
    assert (about_.head == "generation") == (task.kind == "generation")
    if about_.family in ENCODERS:
        with pytest.raises(CheckpointError, match="cannot generate"):
            build_model(config, dtype=torch.float32, backend=EagerBackend())


def test_unknown_architecture_names_the_known_ones() -> None:
    with pytest.raises(CheckpointError) as error:
        build(architecture="MambaForCausalLM")
    assert "MambaForCausalLM" in str(error.value)
    assert all(name in str(error.value) for name in known_architectures())
    assert {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"} <= set(
        known_architectures()
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"architecture": "BertModel", "hidden_act": "mish"}, ["hidden_act", "mish", "gelu"]),
        ({"num_heads": 3, "num_kv_heads": 2}, ["num_attention_heads", "3", "num_key_value_heads", "2"]),
        ({"rotary_dim": 3}, ["rotary_dim", "3"]),
        ({"rotary_dim": 6}, ["rotary_dim", "6", "head_dim", "4"]),
        ({"architecture": "MistralForCausalLM", "sliding_window": 0}, ["sliding_window", "0"]),
        ({"architecture": "Qwen3ForCausalLM", "layer_is_sliding": (True,)}, ["layer_types", "1", "2"]),
        ({"rope": RopeConfig(kind="linear", factor=0.0)}, ["factor", "0.0", "linear"]),
        ({"rope": RopeConfig(kind="llama3", low_freq_factor=4, high_freq_factor=4)}, ["low_freq_factor", "4"]),
    ],
)
def test_impossible_configs_are_refused_by_name(changes: dict[str, object], named: list[str]) -> None:
    with pytest.raises(CheckpointError) as error:
        build(**changes)
    assert all(word in str(error.value) for word in named), str(error.value)
