"""Read what a config.json says of a mixture of experts."""

from __future__ import annotations

from typing import Any

from engine.checkpoints.config_fields import Fields
from engine.checkpoints.model_config import MoeConfig

_QWEN_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
}
MOE_DEFAULTS: dict[str, dict[str, Any]] = {
    "Qwen2MoeForCausalLM": {
        **_QWEN_DEFAULTS,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_window_layers": 28,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
    },
    "Qwen3MoeForCausalLM": {
        **_QWEN_DEFAULTS,
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
    },
    "MixtralForCausalLM": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    },
}
"""What a missing key means, as in `read_config`."""


def read_moe(fields: Fields, num_layers: int) -> MoeConfig | None:
    """None for an architecture without experts, and where no layer has any. Raises CheckpointError."""
    architecture = fields.architecture
    if architecture not in MOE_DEFAULTS:
        return None
    # Either name says it, in all of these architectures; the defaults know one.
    usual, other = "num_local_experts", "num_experts"
    if architecture != "MixtralForCausalLM":
        usual, other = other, usual
    key = other if other in fields.raw and usual not in fields.raw else usual
    sparse_layers = _sparse_layers(fields, num_layers)
    if not any(sparse_layers) or fields.raw.get(key) == 0:
        return None
    num_experts = fields.positive(key)
    top_k = fields.positive("num_experts_per_tok")
    if top_k > num_experts:
        raise fields.error("num_experts_per_tok", f"at most {key} ({num_experts})")
    if architecture == "MixtralForCausalLM":
        width, shared, normalise = fields.positive("intermediate_size"), None, True
    else:
        width = fields.positive("moe_intermediate_size")
        has_shared = architecture == "Qwen2MoeForCausalLM"
        shared = fields.positive("shared_expert_intermediate_size") if has_shared else None
        normalise = fields.flag("norm_topk_prob", False)
    return MoeConfig(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=width,
        shared_intermediate_size=shared,
        normalise=normalise,
        sparse_layers=sparse_layers,
    )


def _sparse_layers(fields: Fields, num_layers: int) -> tuple[bool, ...]:
    """Every `decoder_sparse_step`-th layer but those that `mlp_only_layers` names; of Mixtral all."""
    if fields.architecture == "MixtralForCausalLM":
        return (True,) * num_layers
    step = fields.positive("decoder_sparse_step")
    dense = fields.raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in dense):
        raise fields.error("mlp_only_layers", "a list of layer numbers or null")
    return tuple((number + 1) % step == 0 and number not in dense for number in range(num_layers))
