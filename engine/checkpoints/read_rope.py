"""Read the rotary embedding of a config.json, in its two styles.

Old: `rope_theta`, `rope_scaling` {"type" or "rope_type", ...}, `partial_rotary_factor` at the top. New (transformers
5): `rope_parameters` holds all of it, once or under the name of each layer type.
"""

from __future__ import annotations

from typing import Any

from engine.checkpoints.config_fields import Fields
from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.model_config import RopeConfig

_KINDS = ("default", "linear", "llama3", "yarn")
LAYER_TYPES = ("full_attention", "sliding_attention")
_DEFAULT_THETA = 10000.0


def read_rope(fields: Fields, head_dim: int) -> tuple[RopeConfig, int]:
    """The rotary embedding, and the leading part of a head that it turns. Raises CheckpointError."""
    rope = _rope_fields(fields)
    fraction = rope.positive_number("partial_rotary_factor", 1.0)
    rotary_dim = int(head_dim * fraction)
    if fraction > 1 or rotary_dim < 2 or rotary_dim % 2:
        raise CheckpointError(
            f"{fields.where}: head_dim {head_dim} and partial_rotary_factor {fraction} make a rotary dimension of "
            f"{rotary_dim}; it must be even and in [2, head_dim]"
        )
    kind = _kind(rope)
    theta = rope.positive_number("rope_theta", fields.defaults.get("rope_theta", _DEFAULT_THETA))
    factors = rope.raw.get("frequency_factors")
    if factors is not None and len(factors) != rotary_dim // 2:
        raise CheckpointError(
            f"{fields.where}: {len(factors)} rotary frequency factors do not fit {rotary_dim // 2} frequencies"
        )
    if kind == "default":
        return RopeConfig(theta=theta, frequency_factors=factors), rotary_dim
    if kind == "linear":
        return RopeConfig(
            kind="linear", theta=theta, factor=rope.positive_number("factor"), frequency_factors=factors
        ), rotary_dim
    original = rope.positive("original_max_position_embeddings", fields.positive("max_position_embeddings"))
    if kind == "llama3":
        return _llama3(rope, theta, original), rotary_dim
    return _yarn(rope, theta, original, fields.positive("max_position_embeddings"), factors), rotary_dim


def context_length(fields: Fields) -> int:
    """Most tokens of a sequence: `max_position_embeddings`, times the scaling factor where that is not counted in.

    The same rule as SGLang's: it is counted in for llama3, and where the length before scaling is given too.
    """
    length = fields.positive("max_position_embeddings")
    rope = _rope_fields(fields)
    if _kind(rope) in ("default", "llama3") or rope.raw.get("original_max_position_embeddings") is not None:
        return length
    return int(length * rope.positive_number("factor", 1.0))


def _kind(rope: Fields) -> str:
    kind = rope.raw.get("rope_type", rope.raw.get("type"))
    if kind is None:
        return "default"
    if kind not in _KINDS:
        raise CheckpointError(f"{rope.where}: rope_type is {kind!r}; known are {', '.join(_KINDS)}")
    return str(kind)


def _rope_fields(fields: Fields) -> Fields:
    """The keys of rope_scaling or rope_parameters, with the top-level ones as their defaults."""
    key = "rope_scaling" if fields.raw.get("rope_scaling") else "rope_parameters"
    given = fields.raw.get(key)
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise fields.error(key, "an object")
    where = f"{fields.where}: {key}"
    nested = {name: value for name, value in given.items() if name in LAYER_TYPES}
    if nested:
        given = _the_one_rope(fields, key, nested)
    given = dict(given)
    if fields.raw.get("original_max_position_embeddings") is not None:
        given["original_max_position_embeddings"] = fields.raw["original_max_position_embeddings"]
    top: dict[str, Any] = {
        name: fields.raw[name] for name in ("rope_theta", "partial_rotary_factor") if name in fields.raw
    }
    return Fields(where, fields.architecture, given, top)


def _the_one_rope(fields: Fields, key: str, nested: dict[str, Any]) -> dict[str, Any]:
    """The parameters that all layer types in use share; layers that differ are refused, as no family here has them."""
    used = set(fields.raw.get("layer_types") or ()) & nested.keys() or nested.keys()
    values = [nested[name] for name in LAYER_TYPES if name in used]
    if not all(isinstance(value, dict) for value in values):
        raise fields.error(key, "an object for each layer type")
    if any(value != values[0] for value in values):
        raise fields.error(key, "the same for all layer types")
    return dict(values[0])


def _llama3(rope: Fields, theta: float, original: int) -> RopeConfig:
    low, high = rope.positive_number("low_freq_factor"), rope.positive_number("high_freq_factor")
    if high <= low:
        raise rope.error("high_freq_factor", f"greater than low_freq_factor ({low})")
    return RopeConfig(
        kind="llama3",
        theta=theta,
        factor=rope.positive_number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=original,
    )


def _yarn(rope: Fields, theta: float, original: int, longest: int, factors: tuple[float, ...] | None) -> RopeConfig:
    # null and 0 stand for the default in transformers, too.
    return RopeConfig(
        kind="yarn",
        theta=theta,
        factor=rope.positive_number("factor", longest / original),
        original_context=original,
        beta_fast=rope.number_or_none("beta_fast") or 32.0,
        beta_slow=rope.number_or_none("beta_slow") or 1.0,
        attention_factor=rope.number_or_none("attention_factor"),
        mscale=rope.number_or_none("mscale"),
        mscale_all_dim=rope.number_or_none("mscale_all_dim"),
        truncate=rope.flag("truncate", True),
        frequency_factors=factors,
    )
