"""Weights in the packed form of csrc: the matrices of the cpu backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.kernels import _cpu

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""csrc/types.h's Dtype."""


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """dtype: of the weights as they are stored. packed: the memory itself, without its bias float32 [outputs]."""

    outputs: int
    inputs: int
    dtype: torch.dtype
    gated: bool
    packed: _cpu.Matrix

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def rows(self, start: int, stop: int) -> PackedRows:
        return PackedRows(self, start, stop)

    def bias(self, start: int, stop: int) -> PackedBias:
        return PackedBias(self, start, stop)


@dataclass(frozen=True, eq=False)
class PackedRows:
    """The place of rows [start, stop) of a matrix's weights."""

    matrix: PackedMatrix
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, self.matrix.inputs)

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.matrix.inputs * self.matrix.dtype.itemsize

    @property
    def span(self) -> tuple[int, int]:
        return (0, self.stop - self.start)

    def write(self, start: int, rows: torch.Tensor) -> None:
        _check_within(self.shape[0], start, len(rows))
        self.matrix.packed.write(self.start + start, rows.to("cpu", self.matrix.dtype).contiguous())

    def read(self, count: int | None = None) -> torch.Tensor:
        """The first `count` rows (None: all) as they were written."""
        size = self.shape[0] if count is None else min(count, self.shape[0])
        rows = torch.empty((size, self.matrix.inputs), dtype=self.matrix.dtype)
        self.matrix.packed.read(self.start, rows)
        return rows


@dataclass(frozen=True, eq=False)
class PackedBias:
    """The place of entries [start, stop) of a matrix's bias."""

    matrix: PackedMatrix
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start,)

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * 4

    @property
    def span(self) -> tuple[int, int]:
        return (0, self.stop - self.start)

    def write(self, start: int, rows: torch.Tensor) -> None:
        _check_within(self.shape[0], start, len(rows))
        self.matrix.packed.write_bias(self.start + start, rows.to("cpu", torch.float32).contiguous().numpy())

    def read(self, count: int | None = None) -> torch.Tensor:
        """The first `count` entries (None: all) as they were written."""
        size = self.shape[0] if count is None else min(count, self.shape[0])
        values = torch.empty(size, dtype=torch.float32)
        self.matrix.packed.read_bias(self.start, values)
        return values


def packed_matrix(
    outputs: int, inputs: int, dtype: torch.dtype, *, bias: bool, gated: bool, arena: _cpu.Arena
) -> PackedMatrix:
    """Allocate from an arena. Raises MemoryError."""
    packed = _cpu.Matrix(outputs, inputs, DTYPES[dtype], gated, bias, arena)
    return PackedMatrix(outputs, inputs, dtype, gated, packed)


def _check_within(size: int, start: int, count: int) -> None:
    if not 0 <= start <= start + count <= size:
        raise IndexError(f"rows {start} to {start + count} do not fit a place of {size}")
