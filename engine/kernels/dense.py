"""Weights as plain torch tensors: the matrices of the reference ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.checkpoints.weights import Place, TensorPlace


@dataclass(frozen=True, eq=False)
class DenseMatrix:
    """weight: [outputs, inputs]. offset: [outputs] or None, the bias."""

    weight: torch.Tensor
    offset: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.offset is None else self.offset.nbytes)

    def rows(self, start: int, stop: int) -> Place:
        return TensorPlace(self.weight[start:stop])

    def bias(self, start: int, stop: int) -> Place:
        if self.offset is None:
            raise ValueError("this matrix has no bias")
        return TensorPlace(self.offset[start:stop])
