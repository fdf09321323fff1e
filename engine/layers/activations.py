"""Activation functions by the names that configs have for them."""

from __future__ import annotations

from engine.kernels.table import Activation

_NAMES: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "tanh": "tanh",
}


def activation_named(name: str) -> Activation | None:
    """The function that transformers knows by `name`; None: none that is served."""
    return _NAMES.get(name)


def activation_names() -> list[str]:
    """The names that `activation_named` knows."""
    return list(_NAMES)
