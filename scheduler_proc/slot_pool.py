"""The free slots of the KV pool. A slot holds the keys and values of one token in every layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int32]


class SlotPool:
    """A stack of free slot numbers, each in [0, size)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._stack: Slots = np.arange(size - 1, -1, -1, dtype=np.int32)
        self._count = size

    @property
    def free_count(self) -> int:
        return self._count

    def take(self, count: int) -> Slots:
        """Take `count` slots. Raises ValueError when fewer are free: the caller makes room first."""
        if count > self._count:
            raise ValueError(f"{count} slots wanted, {self._count} of {self.size} are free")
        self._count -= count
        return self._stack[self._count : self._count + count].copy()

    def give_back(self, slots: Slots) -> None:
        """Return slots that were taken. Raises ValueError when more come back than were ever taken."""
        end = self._count + len(slots)
        if end > self.size:
            raise ValueError(f"{len(slots)} slots returned to a pool of {self.size} that has {self._count} free")
        self._stack[self._count : end] = slots
        self._count = end

    def free_slots(self) -> Slots:
        """The free slots (for invariant checks)."""
        return self._stack[: self._count].copy()
