"""Places that take a rank's part of a checkpoint's tensor and leave the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.checkpoints.weights import Place
from engine.parallel.division import Part


@dataclass(frozen=True, eq=False)
class RowsOf:
    """The Place of rows `part` of a tensor: `inner` holds these alone."""

    inner: Place
    part: Part

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.part.total, *self.inner.shape[1:])

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    @property
    def span(self) -> tuple[int, int]:
        return (self.part.start, self.part.stop)

    def write(self, start: int, rows: torch.Tensor) -> None:
        first, last = max(start, self.part.start), min(start + len(rows), self.part.stop)
        if first < last:
            self.inner.write(first - self.part.start, rows[first - start : last - start])

    def read(self, count: int | None = None) -> torch.Tensor:
        """Of the first `count` rows those that are held here."""
        held = self.part.size if count is None else min(max(count - self.part.start, 0), self.part.size)
        return self.inner.read(held)


@dataclass(frozen=True, eq=False)
class ColumnsOf:
    """The Place of columns `part` of a matrix: `inner` holds these alone."""

    inner: Place
    part: Part

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.inner.shape[0], self.part.total)

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    @property
    def span(self) -> tuple[int, int]:
        return self.inner.span

    def write(self, start: int, rows: torch.Tensor) -> None:
        self.inner.write(start, rows[:, self.part.start : self.part.stop])

    def read(self, count: int | None = None) -> torch.Tensor:
        """The columns that are held here."""
        return self.inner.read(count)


@dataclass(frozen=True)
class NotHere:
    """The Place of a tensor that another rank holds."""

    shape: tuple[int, ...]
    nbytes: int = 0
    span: tuple[int, int] = (0, 0)

    def write(self, start: int, rows: torch.Tensor) -> None:
        pass

    def read(self, count: int | None = None) -> torch.Tensor:
        return torch.empty((0, *self.shape[1:]))


def rows_of(inner: Place, part: Part) -> Place:
    return inner if part.is_whole else RowsOf(inner, part)


def columns_of(inner: Place, part: Part) -> Place:
    return inner if part.is_whole else ColumnsOf(inner, part)
