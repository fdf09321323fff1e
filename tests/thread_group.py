"""Ranks as threads of the test's own process: a group of plain tensors, which the others are held to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from engine.parallel.group import in_order

S = TypeVar("S")
T = TypeVar("T")


@dataclass
class Meeting:
    barrier: threading.Barrier
    brought: list[torch.Tensor | None]


@dataclass(frozen=True)
class ThreadGroup:
    rank: int
    meeting: Meeting = field(repr=False)

    @property
    def size(self) -> int:
        return len(self.meeting.brought)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return in_order(self._meet(x))

    def gather(self, x: torch.Tensor) -> list[torch.Tensor] | None:
        parts = self._meet(x)
        return parts if self.rank == 0 else None

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._meet(x))

    def _meet(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.meeting.brought[self.rank] = x
        self.meeting.barrier.wait(20)
        parts = [part.clone() for part in self.meeting.brought if part is not None]
        self.meeting.barrier.wait(20)
        return parts


def thread_groups(size: int) -> list[ThreadGroup]:
    meeting = Meeting(threading.Barrier(size), [None] * size)
    return [ThreadGroup(rank, meeting) for rank in range(size)]


def on_each(ranks: Sequence[S], work: Callable[[S], T]) -> list[T]:
    """What `work` makes of each of `ranks`, all at the same time."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(work, ranks))
