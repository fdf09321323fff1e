"""Qwen3's mixture of experts (Qwen3MoeForCausalLM): normalised heads, no shared expert."""

from __future__ import annotations

from engine.checkpoints.model_config import ModelConfig
from engine.layers.decoder import sliding_windows
from engine.layers.weights import DecoderTraits


def traits(config: ModelConfig) -> DecoderTraits:
    """Qwen3's mixture of experts as `config` has it; attention_bias, where set, is on all four projections."""
    return DecoderTraits(
        qkv_bias=config.attention_bias,
        output_bias=config.output_bias,
        mlp_bias=False,
        head_norms=True,
        windows=sliding_windows(config),
    )
