"""What the config.json of a Gemma 3 text model says in words of its own."""

from __future__ import annotations

from typing import Any

from engine.checkpoints.config_fields import Fields
from engine.checkpoints.read_rope import LAYER_TYPES, read_rope

GEMMA3_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def gemma3_fields(fields: Fields) -> dict[str, Any]:
    """Fields of ModelConfig that other families have not; `rope_fields`: where to read the rope of layers without a
    window. Raises CheckpointError, also for what is not served: soft caps, and attention in both directions."""
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        if fields.number_or_none(key) is not None:
            raise fields.error(key, "null: soft caps are not served")
    if fields.flag("use_bidirectional_attention", False):
        raise fields.error("use_bidirectional_attention", "false: windows in both directions are not served")
    of_type = _ropes_by_layer_type(fields)
    local, rotary_dim = read_rope(of_type["sliding_attention"], head_dim := fields.positive("head_dim"))
    if rotary_dim != head_dim:
        raise fields.error("partial_rotary_factor", "1 in layers with a window")
    return {
        "rope_fields": of_type["full_attention"],
        "local_rope": local,
        "attention_scale": fields.positive_number("query_pre_attn_scalar") ** -0.5,
        "hidden_act": fields.text("hidden_activation"),
        # A scaling of the positions is counted in.
        "context_length": fields.positive("max_position_embeddings"),
    }


def _ropes_by_layer_type(fields: Fields) -> dict[str, Fields]:
    """The same config once for each layer type, its rope in the old style.

    Old configs give `rope_theta` and `rope_scaling` for layers without a window, `rope_local_base_freq` for the others.
    """
    given = fields.raw.get("rope_parameters")
    if not isinstance(given, dict) or not any(name in given for name in LAYER_TYPES):
        given = {"full_attention": given}
    found = {}
    for name, base in (("full_attention", "rope_theta"), ("sliding_attention", "rope_local_base_freq")):
        own = given.get(name) or {}
        if not isinstance(own, dict):
            raise fields.error("rope_parameters", "an object for each layer type")
        if name == "full_attention" and isinstance(fields.raw.get("rope_scaling"), dict):
            own = own | fields.raw["rope_scaling"]
        theta = fields.positive_number(base, GEMMA3_DEFAULTS[base])
        raw = {**fields.raw, "rope_scaling": None, "rope_parameters": {"rope_theta": theta, **own}}
        found[name] = Fields(fields.where, fields.architecture, raw, fields.defaults)
    return found


def gemma3_sliding(fields: Fields, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window, and which layers have it: those that `layer_types` names, else all but each last of a pattern."""
    layer_types = fields.raw.get("layer_types")
    if layer_types is None:
        pattern = fields.positive("sliding_window_pattern")
        layers = tuple((number + 1) % pattern != 0 for number in range(num_layers))
    else:
        if not isinstance(layer_types, list) or len(layer_types) != num_layers:
            raise fields.error("layer_types", f"a list of num_hidden_layers ({num_layers}) entries")
        if any(kind not in LAYER_TYPES for kind in layer_types):
            raise fields.error("layer_types", "a list of 'full_attention' and 'sliding_attention'")
        layers = tuple(kind == "sliding_attention" for kind in layer_types)
    window = fields.positive("sliding_window") if any(layers) else None
    return window, layers
