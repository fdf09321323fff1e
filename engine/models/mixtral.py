"""Mixtral (MixtralForCausalLM): Mistral's attention, and a mixture of experts in every layer."""

from __future__ import annotations

from engine.checkpoints.model_config import ModelConfig
from engine.layers.decoder import sliding_windows
from engine.layers.weights import DecoderTraits, MoeNames


def traits(config: ModelConfig) -> DecoderTraits:
    """Mixtral as `config` has it. Its checkpoints number an expert's projections: gate 1, down 2, up 3."""
    return DecoderTraits(
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        head_norms=False,
        windows=sliding_windows(config),
        moe_names=MoeNames(block="block_sparse_moe", gate="w1", up="w3", down="w2"),
    )
