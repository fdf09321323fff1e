"""The head of a model whose vocabulary is divided among ranks: each computes the logits of its part.

On CPUs rank 0 gets of them what it samples from, which is seldom more than a few of each row. GPUs have quick lines and
do not like to be waited for: there every rank gets all of them within the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from engine.kernels.batch import RaggedBatch
from engine.kernels.table import Backend, Integers, Longs, Ops, Program, Rows
from engine.parallel.division import Part

MOST_KEPT = 256
"""Rows of which more logits are wanted than so many are gathered whole: finding the largest would cost more."""


@runtime_checkable
class JoinsHeads(Protocol):
    """A backend that puts the ranks' logits together on the device."""

    def joined_head(self, head: Callable[[Ops, Any], Any], part: Part) -> Callable[[Ops, Any], Any]:
        """Of a head that makes logits [R, part.size] one that makes [R, part.total], on every rank."""
        ...


@dataclass(slots=True)
class VocabularyGather:
    """A program whose inner one makes logits [R, part.size]; rank 0 gets [R, part.total], the others nothing.

    rows: rank 0's logits. touched: which of them hold something, row → ids (None: all of it).
    """

    inner: Program
    backend: Backend
    part: Part
    rows: torch.Tensor = field(default_factory=lambda: torch.empty((0, 0)))
    touched: dict[int, torch.Tensor | None] = field(default_factory=dict)

    def run(self, batch: RaggedBatch, rows: Rows, keep: Longs | None = None) -> torch.Tensor:
        return self._collect(self.inner.run(batch, rows), keep)

    def logits(self, rows: Rows, keep: Longs | None = None) -> torch.Tensor:
        return self._collect(self.inner.logits(rows), keep)

    def pooled(self) -> torch.Tensor:
        return self.inner.pooled()

    def routing(self) -> list[Integers]:
        return self.inner.routing()

    def set_profiling(self, on: bool) -> None:
        self.inner.set_profiling(on)

    def take_profile(self) -> dict[str, float]:
        return self.inner.take_profile()

    def _collect(self, own: torch.Tensor, keep: Longs | None) -> torch.Tensor:
        """own: this rank's logits [R, part.size] → all of them, as far as they are kept, on rank 0."""
        count = len(own)
        if not count:
            return own.new_empty((0, self.part.total))
        kept = np.full(count, -1) if keep is None else np.where(keep > MOST_KEPT, -1, keep)
        whole = np.flatnonzero(kept < 0)
        some = np.flatnonzero(kept >= 0)
        group = self.backend.group
        wholes = group.gather(own[torch.from_numpy(whole)].contiguous()) if len(whole) else []
        if wholes is not None and len(whole):
            self._begin(count)
            self._put_whole(whole.tolist(), wholes)
        elif wholes is not None and group.rank == 0:
            self._begin(count)
        if len(some):
            most = max(1, int(kept[some].max()))
            ids, values = largest(self.backend, own[torch.from_numpy(some)], min(most, self.part.size))
            all_ids = group.gather(ids + self.part.start)
            if all_ids is not None:
                all_ids = [one.clone() for one in all_ids]
            all_values = group.gather(values)
            if all_ids is not None and all_values is not None:
                self._put_some(some.tolist(), torch.cat(all_ids, 1), torch.cat(all_values, 1))
        return self.rows[:count] if group.rank == 0 else own.new_empty((0, self.part.total))

    def _begin(self, count: int) -> None:
        """Minus infinity in `count` rows; only what the last step has touched need be written."""
        if len(self.rows) < count:
            self.rows = torch.full((count, self.part.total), -torch.inf)
        else:
            for row, ids in self.touched.items():
                self.rows[row, slice(None) if ids is None else ids] = -torch.inf
        self.touched = {}

    def _put_whole(self, rows: list[int], parts: list[torch.Tensor]) -> None:
        start = 0
        for part in parts:
            self.rows[rows, start : start + part.shape[1]] = part
            start += part.shape[1]
        self.touched |= dict.fromkeys(rows)

    def _put_some(self, rows: list[int], ids: torch.Tensor, values: torch.Tensor) -> None:
        for row, here, what in zip(rows, ids, values, strict=True):
            self.rows[row, here] = what
            self.touched[row] = here


def largest(backend: Backend, logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest of each row of logits [R, V] in any order, the lower ids of equals: int64 ids and float32
    values [R, count]. A row with a NaN gives one."""
    if count == 1:
        best, peaks = backend.best(logits)
        return torch.from_numpy(best)[:, None], torch.from_numpy(peaks)[:, None]
    ids = torch.empty((len(logits), count), dtype=torch.int64)
    for row, found in zip(logits, ids, strict=True):
        if not (above := row.topk(count).values).isfinite().all():
            found.copy_(row.sort(descending=True, stable=True).indices[:count])
            continue
        surely = (row > above[-1]).nonzero()[:, 0]
        ties = (row == above[-1]).nonzero()[: count - len(surely), 0]
        found.copy_(torch.cat((surely, ties)))
    return ids, logits.gather(1, ids)
