"""Rotary frequencies against `transformers`' own."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_config import CONFIG
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.model_config import RopeConfig
from engine.layers.rope import rotary_frequencies

CONTEXT = 4096
HEAD_DIMS = st.sampled_from([8, 20, 64, 96, 128])
THETAS = st.sampled_from([500.0, 10000.0, 100000.0, 1e6])
FACTORS = st.floats(0.5, 40)


def check(rope: RopeConfig, head_dim: int, rotary_dim: int, parameters: dict[str, Any]) -> None:
    """parameters: the same scaling in the words of config.json."""
    theirs = LlamaConfig(
        head_dim=head_dim,
        max_position_embeddings=CONTEXT,
        rope_parameters={
            "rope_theta": rope.theta,
            "rope_type": rope.kind,
            "partial_rotary_factor": rotary_dim / head_dim,
            **parameters,
        },
    )
    if rope.kind == "default":
        inverse, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(theirs)
    else:
        inverse, factor = ROPE_INIT_FUNCTIONS[rope.kind](theirs, "cpu")
    config = msgspec.structs.replace(
        CONFIG, head_dim=head_dim, rotary_dim=rotary_dim, context_length=CONTEXT, rope=rope
    )
    ours = rotary_frequencies(config)
    assert ours.inverse.dtype == torch.float32
    torch.testing.assert_close(ours.inverse, inverse, rtol=2e-6, atol=0)
    assert abs(ours.factor - factor) < 1e-12


@given(HEAD_DIMS, THETAS)
def test_default(head_dim: int, theta: float) -> None:
    check(RopeConfig(theta=theta), head_dim, head_dim, {})


@given(HEAD_DIMS, THETAS, FACTORS, st.booleans())
def test_linear(head_dim: int, theta: float, factor: float, half: bool) -> None:
    rotary_dim = head_dim // 2 if half else head_dim
    check(RopeConfig(kind="linear", theta=theta, factor=factor), head_dim, rotary_dim, {"factor": factor})


@given(HEAD_DIMS, THETAS, FACTORS, st.floats(0.5, 2), st.floats(2.5, 8), st.sampled_from([None, 256, 8192]))
def test_llama3(head_dim: int, theta: float, factor: float, low: float, high: float, original: int | None) -> None:
    parameters: dict[str, Any] = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    rope = RopeConfig(kind="llama3", theta=theta, original_context=original, **parameters)
    check(rope, head_dim, head_dim, {**parameters, **_original(original)})


@settings(max_examples=200)
@given(HEAD_DIMS, THETAS, FACTORS, st.sampled_from([None, 64, 2048]), st.booleans(), st.booleans(), st.data())
def test_yarn(
    head_dim: int, theta: float, factor: float, original: int | None, truncate: bool, half: bool, data: st.DataObject
) -> None:
    chosen = data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "attention_factor": st.floats(0.5, 2),
                "mscale": st.floats(0.5, 2),
                "mscale_all_dim": st.floats(0.5, 2),
                "beta_fast": st.floats(8, 64),
                "beta_slow": st.floats(0.5, 4),
            },
        )
    )
    parameters: dict[str, Any] = {"factor": factor, "truncate": truncate, **chosen}
    rope = RopeConfig(kind="yarn", theta=theta, original_context=original, **parameters)
    check(rope, head_dim, head_dim // 2 if half else head_dim, {**parameters, **_original(original)})


@given(HEAD_DIMS, THETAS, st.floats(1, 40))
def test_frequency_factors_say_the_same_as_the_scaling(head_dim: int, theta: float, factor: float) -> None:
    """GGUF files hold llama3's scaling as what each frequency is divided by."""

    def inverse(rope: RopeConfig) -> torch.Tensor:
        config = msgspec.structs.replace(CONFIG, head_dim=head_dim, rotary_dim=head_dim, rope=rope)
        return rotary_frequencies(config).inverse

    scaled = inverse(RopeConfig(kind="llama3", theta=theta, factor=factor, original_context=CONTEXT))
    factors = tuple((inverse(RopeConfig(theta=theta)) / scaled).tolist())
    torch.testing.assert_close(inverse(RopeConfig(theta=theta, frequency_factors=factors)), scaled, rtol=1e-6, atol=0)


def test_frequency_factors_of_another_length_are_refused() -> None:
    rope = RopeConfig(frequency_factors=(1.0, 2.0, 3.0))
    with pytest.raises(CheckpointError, match="3 rotary frequency factors do not fit 2 frequencies"):
        rotary_frequencies(msgspec.structs.replace(CONFIG, rope=rope))


def _original(original: int | None) -> dict[str, int]:
    return {} if original is None else {"original_max_position_embeddings": original}
