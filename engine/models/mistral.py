"""Mistral (MistralForCausalLM): no biases; where the config has a sliding window, all layers have it."""

from __future__ import annotations

from engine.checkpoints.model_config import ModelConfig
from engine.layers.weights import DecoderTraits


def traits(config: ModelConfig) -> DecoderTraits:
    """Mistral as `config` has it. Unlike Qwen's, its config has no list of layers: the window holds everywhere."""
    return DecoderTraits(
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        head_norms=False,
        windows=(config.sliding_window,) * config.num_layers,
    )
