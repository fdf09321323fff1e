"""Rotary frequencies and their scaling: default, linear, llama3, yarn, and factors as GGUF files carry them."""

from __future__ import annotations

import math

import torch

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.model_config import ModelConfig, RopeConfig
from engine.kernels.table import RotaryFrequencies


def rotary_frequencies(config: ModelConfig) -> RotaryFrequencies:
    """The model's rotary frequencies, scaled as its config asks. Raises CheckpointError on an impossible scaling."""
    rope, dim = config.rope, config.rotary_dim
    if dim < 2 or dim % 2 or dim > config.head_dim:
        raise CheckpointError(
            f"rotary_dim is {dim}; it must be even, at least 2 and at most head_dim, {config.head_dim}"
        )
    if rope.factor <= 0:
        raise CheckpointError(f"the factor of rope scaling {rope.kind!r} is {rope.factor}; it must be above 0")
    original = rope.original_context or config.context_length
    factor = 1.0
    match rope.kind:
        case "default":
            inverse = _unscaled(rope.theta, dim)
        case "linear":
            inverse = _unscaled(rope.theta, dim) / rope.factor
        case "llama3":
            inverse = _llama3(rope, dim, original)
        case "yarn":
            inverse = _yarn(rope, dim, original)
            factor = _yarn_attention_factor(rope)
    if rope.frequency_factors is not None:
        if len(rope.frequency_factors) != dim // 2:
            raise CheckpointError(
                f"{len(rope.frequency_factors)} rotary frequency factors do not fit {dim // 2} frequencies"
            )
        inverse = inverse / torch.tensor(rope.frequency_factors, dtype=torch.float32)
    return RotaryFrequencies(inverse=inverse, factor=factor)


def _unscaled(theta: float, dim: int) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def _llama3(rope: RopeConfig, dim: int, original: int) -> torch.Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, and those between interpolated."""
    low, high = rope.low_freq_factor, rope.high_freq_factor
    if low >= high:
        raise CheckpointError(f"rope's low_freq_factor, {low}, must be below high_freq_factor, {high}")
    inverse = _unscaled(rope.theta, dim)
    turns = original * inverse / (2 * math.pi)  # how often a channel turns within the original context
    kept = torch.clamp((turns - low) / (high - low), 0, 1)  # 0: stretched, 1: as it was
    return (1 - kept) * inverse / rope.factor + kept * inverse


def _yarn(rope: RopeConfig, dim: int, original: int) -> torch.Tensor:
    """YaRN (Peng et al. 2023, arXiv:2309.00071), section 3.2: a ramp over channels between two rotation counts."""

    def channel_that_turns(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel_that_turns(rope.beta_fast), channel_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    inverse = _unscaled(rope.theta, dim)
    stretched = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    return stretched * inverse / rope.factor + (1 - stretched) * inverse


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by; the default is the paper's, section 3.4."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
