"""The way of a tensor from a checkpoint into a model: out of memory-mapped files, a few rows at a time, into its place.

In between there are only pieces of bounded size, so that neither the layout of the file nor that of the model (which
may be packed for a kernel) need be a plain tensor, and no tensor is ever in memory twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

# Elements of a piece: 2 MB in float32. Smaller ones cost more in Python than they save in the cache: with 2**17 the
# default model took 0.30 s to load instead of 0.20, as two threads handed the interpreter to and fro.
_PIECE = 1 << 19
# Places that are packed take rows in groups of so many; of wide rows a piece still has a whole group, up to _LARGEST.
_GROUP = 32
_LARGEST = 1 << 20


class Place(Protocol):
    """Where a tensor of a checkpoint belongs in a model."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape in the checkpoint."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor's values take in the model."""
        ...

    @property
    def span(self) -> tuple[int, int]:
        """Rows [start, stop) that are kept: others need not be written."""
        ...

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Put rows [n, *shape[1:]] (of any float dtype, device and strides) where rows start to start + n belong.

        The rows of a vector are its entries, and a scalar is one row of the shape [1]. Converts to the place's own
        dtype, and keeps nothing of `rows`. Pieces of one tensor arrive one after the other, those of different
        tensors from several threads at once.

        Any start and n are right. Pieces whose start and n are multiples of 32 (only a tensor's last n is not) are
        what a packed place writes fastest; readers send such ones unless rows are wider than 32,768 elements.
        """
        ...

    def read(self, count: int | None = None) -> torch.Tensor:
        """The first `count` rows (None, or more than there are: all), in the dtype in which they are kept."""
        ...


@dataclass(frozen=True, eq=False)
class TensorPlace:
    """The Place that is a tensor, or a view of one, of the checkpoint's shape."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @property
    def span(self) -> tuple[int, int]:
        return (0, rows_in(self.shape))

    def write(self, start: int, rows: torch.Tensor) -> None:
        target = self.tensor if self.tensor.dim() else self.tensor.unsqueeze(0)
        target.narrow(0, start, rows.shape[0]).copy_(rows)

    def read(self, count: int | None = None) -> torch.Tensor:
        rows = self.tensor if self.tensor.dim() else self.tensor.unsqueeze(0)
        return rows[:count].clone()


@dataclass(frozen=True, eq=False)
class OffsetPlace:
    """A Place of weights to which a model adds a constant each time it uses them: they are kept with it added."""

    inner: Place
    offset: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    @property
    def span(self) -> tuple[int, int]:
        return self.inner.span

    def write(self, start: int, rows: torch.Tensor) -> None:
        self.inner.write(start, rows.float() + self.offset)

    def read(self, count: int | None = None) -> torch.Tensor:
        return self.inner.read(count) - self.offset


class WeightReader(Protocol):
    """The tensors of a checkpoint under their Hugging Face names, whatever file they lie in."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every tensor."""
        ...

    def pieces(self, name: str, span: tuple[int, int] | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """A tensor as (start, rows), with rows as in `Place.write`, that together are each of its rows once.

        span: those pieces only that hold a row of [start, stop). The pieces come in any order; a tensor without
        elements has none. `rows` lies in the file's pages or in a buffer that the next piece uses again: copy it before
        asking for that, and never write to it. Raises CheckpointError, which names the file and the tensor, for what
        cannot be read.
        """
        ...


def rows_in(shape: tuple[int, ...]) -> int:
    """Rows of a tensor of that shape; a scalar is one."""
    return shape[0] if shape else 1


def overlap(start: int, stop: int, span: tuple[int, int] | None) -> bool:
    """Whether rows [start, stop) and a span have a row in common; all have with None."""
    return span is None or (start < span[1] and span[0] < stop)


def row_ranges(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The rows of a tensor, cut into pieces (start, stop) of a good size.

    Pieces have at most 2**19 elements and start at multiples of 32 rows. Where 32 rows are more than that, a piece is
    32 rows, if those have at most 2**20 elements, else as many rows as have, but always one.
    """
    rows = shape[0] if shape else 1
    columns = math.prod(shape[1:])
    if columns == 0:
        return
    step = _PIECE // columns // _GROUP * _GROUP
    if step == 0:
        step = min(_GROUP, max(1, _LARGEST // columns))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
