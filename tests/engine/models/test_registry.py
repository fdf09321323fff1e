"""What the registry accepts and refuses."""

from __future__ import annotations

import msgspec
import pytest
import torch
from tiny_config import CONFIG

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.model_config import RopeConfig
from engine.kernels.eager import EagerBackend
from engine.models.registry import build_model, known_architectures


def build(**changes: object) -> None:
    build_model(msgspec.structs.replace(CONFIG, **changes), dtype=torch.float32, backend=EagerBackend())


@pytest.mark.parametrize("architecture", known_architectures())
def test_known_architectures_build(architecture: str) -> None:
    build(architecture=architecture)


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
