"""Qwen2 and Qwen2.5 (Qwen2ForCausalLM): biases on q, k and v, and sliding windows in the layers that ask for one."""

from __future__ import annotations

from engine.checkpoints.model_config import ModelConfig
from engine.layers.decoder import sliding_windows
from engine.layers.weights import DecoderTraits


def traits(config: ModelConfig) -> DecoderTraits:
    """Qwen2 as `config` has it. The biases are part of the architecture: no config key names them."""
    return DecoderTraits(
        qkv_bias=True,
        output_bias=False,
        mlp_bias=False,
        head_norms=False,
        windows=sliding_windows(config),
    )
