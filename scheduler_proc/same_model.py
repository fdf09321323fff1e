"""Whether two checkpoints are of one model: whether tensors in the same places are computed with alike."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import torch

from engine.checkpoints.model_config import ModelConfig
from engine.checkpoints.task import Task
from engine.layers.rope import rotary_frequencies

_NO_MATTER = {"model_type", "dtype", "context_length", "bos_id", "eos_ids", "raw"}
"""Fields of a config that no step depends on."""
_SEEN_IN_TENSORS = {"attention_bias", "output_bias", "mlp_bias"}
"""Fields that only say which tensors there are; the check of the tensors is the better judge of that."""
_TASK_FIELDS = ("kind", "pooling", "dense", "normalise", "width", "score_activation")
_ROPE_TOLERANCE = 1e-6
"""Relative: GGUF files carry the scaling of llama3 as factors that were rounded once more."""


def config_differences(serving: ModelConfig, other: ModelConfig) -> list[str]:
    """What makes `other` compute differently from `serving`, one clause each."""
    left_out = _NO_MATTER | _SEEN_IN_TENSORS | {"rope", "layer_is_sliding", "hidden_act"}
    found = [
        _clause(name, getattr(serving, name), getattr(other, name))
        for name in serving.__struct_fields__
        if name not in left_out and not _equal(getattr(serving, name), getattr(other, name))
    ]
    if _act(serving) != _act(other):
        found.append(_clause("hidden_act", serving.hidden_act, other.hidden_act))
    if serving.sliding_window is not None and serving.layer_is_sliding != other.layer_is_sliding:
        found.append("other layers have the sliding window")
    if not found and not _same_rotation(serving, other):
        found.append(_clause("rope", _told(serving), _told(other)))
    return found


def task_differences(serving: Task, other: Task) -> list[str]:
    """What makes `other` answer differently from `serving`, one clause each."""
    pairs = [(name, getattr(serving, name), getattr(other, name)) for name in _TASK_FIELDS]
    return [_clause(name, old, new) for name, old, new in pairs if old != new]


def _clause(name: str, old: Any, new: Any) -> str:
    return f"{name} is {new!r} instead of {old!r}"


def _equal(old: Any, new: Any) -> bool:
    """Numbers are compared as the kernels take them, in float32: GGUF files have no others."""
    if isinstance(old, float) and isinstance(new, float):
        return bool(np.float32(old) == np.float32(new))
    return bool(old == new)


def _act(config: ModelConfig) -> str:
    return "silu" if config.hidden_act == "swish" else config.hidden_act


def _same_rotation(serving: ModelConfig, other: ModelConfig) -> bool:
    if serving.rope == other.rope and serving.rope.kind == "default":
        return True
    old, new = rotary_frequencies(serving), rotary_frequencies(other)
    return old.factor == new.factor and torch.allclose(old.inverse, new.inverse, rtol=_ROPE_TOLERANCE, atol=0)


def _told(config: ModelConfig) -> dict[str, Any]:
    """The rope's settings that are not the usual ones, without long lists."""
    usual = {field.name: field.default for field in msgspec.structs.fields(config.rope)}
    settings = msgspec.structs.asdict(config.rope)
    return {
        name: "..." if isinstance(value, tuple) else value for name, value in settings.items() if value != usual[name]
    }
