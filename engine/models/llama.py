"""Llama (LlamaForCausalLM): the plain decoder; biases only where the config asks for them."""

from __future__ import annotations

from engine.checkpoints.model_config import ModelConfig
from engine.layers.weights import DecoderTraits


def traits(config: ModelConfig) -> DecoderTraits:
    """Llama as `config` has it: every layer sees the whole context."""
    return DecoderTraits(
        qkv_bias=config.attention_bias,
        output_bias=config.output_bias,
        mlp_bias=config.mlp_bias,
        head_norms=False,
        windows=(None,) * config.num_layers,
    )
