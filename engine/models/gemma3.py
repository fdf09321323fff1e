"""Gemma 3, text only (Gemma3ForCausalLM): norms on both sides of each block, two rotary bases."""

from __future__ import annotations

from engine.checkpoints.model_config import ModelConfig
from engine.layers.decoder import sliding_windows
from engine.layers.weights import DecoderTraits


def traits(config: ModelConfig) -> DecoderTraits:
    """Gemma 3 as `config` has it. Its norms scale by 1 + weight."""
    return DecoderTraits(
        qkv_bias=config.attention_bias,
        output_bias=config.output_bias,
        mlp_bias=False,
        head_norms=True,
        windows=sliding_windows(config),
        activation="gelu_tanh",
        post_norms=True,
        norm_offset=1.0,
        scaled_embedding=True,
    )
