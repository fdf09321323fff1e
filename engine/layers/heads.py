"""Heads that return vectors: hidden states as they are, or through the dense layers of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.checkpoints.task import Task
from engine.kernels.table import Activation, Matrix, Ops


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """A linear layer and what follows it."""

    matrix: Matrix
    activation: Activation


def allocate_dense(linear: Callable[[dict[str, int], int, bool], Matrix], task: Task) -> tuple[DenseLayer, ...]:
    """linear: allocates a matrix from (name → rows, inputs, whether it has a bias)."""
    return tuple(
        DenseLayer(linear({f"{module.path}.linear": module.outputs}, module.inputs, module.bias), module.activation)
        for module in task.dense
    )


def through_dense(ops: Ops, rows: torch.Tensor, layers: tuple[DenseLayer, ...]) -> torch.Tensor:
    """Pooled rows [R, H] → float32 [R, width]."""
    for number, layer in enumerate(layers):
        if layer.activation == "identity" and number == len(layers) - 1:
            return ops.logits(rows, layer.matrix)  # not rounded to the weights' dtype
        rows = ops.linear(rows, layer.matrix, layer.activation)
    return ops.vectors(rows)
