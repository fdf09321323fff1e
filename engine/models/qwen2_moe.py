"""Qwen2's mixture of experts (Qwen2MoeForCausalLM): besides its experts each token passes a shared one."""

from __future__ import annotations

from engine.checkpoints.model_config import ModelConfig
from engine.layers.decoder import sliding_windows
from engine.layers.weights import DecoderTraits


def traits(config: ModelConfig) -> DecoderTraits:
    """Qwen2's mixture of experts as `config` has it; its attention is Qwen2's."""
    return DecoderTraits(
        qkv_bias=config.attention_bias,
        output_bias=False,
        mlp_bias=False,
        head_norms=False,
        windows=sliding_windows(config),
    )
