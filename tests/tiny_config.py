"""Hyperparameters of a model for tests that need no checkpoint; `msgspec.structs.replace` makes others of it."""

from __future__ import annotations

from engine.checkpoints.model_config import ModelConfig, RopeConfig

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    model_type="llama",
    hidden_size=12,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=4,
    rotary_dim=4,
    intermediate_size=8,
    vocab_size=16,
    context_length=64,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    rope=RopeConfig(),
    tie_embeddings=False,
    attention_bias=False,
    output_bias=False,
    mlp_bias=False,
    sliding_window=None,
    layer_is_sliding=(False, False),
    dtype=None,
    bos_id=None,
    eos_ids=(),
    raw={},
)
