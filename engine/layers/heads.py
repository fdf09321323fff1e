"""Heads that return vectors: hidden states as they are, or through dense layers, or labels behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.checkpoints.task import Task
from engine.kernels.table import Activation, Matrix, Ops
from engine.parallel.division import Part, whole


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """A linear layer and what follows it."""

    matrix: Matrix
    activation: Activation


def allocate_dense(linear: Callable[[dict[str, Part], int, bool], Matrix], task: Task) -> tuple[DenseLayer, ...]:
    """linear: allocates a matrix from (name → rows, inputs, whether it has a bias). Each rank has all of it."""
    return tuple(
        DenseLayer(
            linear({f"{module.path}.linear": whole(module.outputs)}, module.inputs, module.bias), module.activation
        )
        for module in task.dense
    )


def head_output(ops: Ops, rows: torch.Tensor, layers: tuple[DenseLayer, ...], output: Matrix | None) -> torch.Tensor:
    """Pooled rows [R, H], through the layers and the output's matrix if there is one → float32 [R, width]."""
    if output is None and layers and layers[-1].activation == "identity":
        layers, output = layers[:-1], layers[-1].matrix  # what `logits` returns is not rounded to the weights' dtype
    for layer in layers:
        rows = ops.linear(rows, layer.matrix, layer.activation)
    return ops.vectors(rows) if output is None else ops.logits(rows, output)
