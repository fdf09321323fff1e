"""Pinned memory that steps use in turn, for what they copy to the device and back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from engine.kernels.gpu.machine import Event, Machine

DEPTH = 4
"""Two steps are on their way at most, and each takes one buffer for its inputs and one for its results."""
ALIGNED = 256
"""Bytes: pieces of a buffer start at multiples of this, as torch's tensors on a GPU do."""


@dataclass(slots=True)
class Slot:
    """One buffer, uint8. done: behind the last copy from or to it; whoever queues that records it. lap: how often the
    buffer has been given out."""

    buffer: torch.Tensor
    done: Event
    lap: int = 0


@dataclass(slots=True)
class Ring:
    """A buffer is given out again when the copies from and to it are done, which is seldom waited for."""

    machine: Machine
    slots: list[Slot] = field(default_factory=list)
    turn: int = 0

    def take(self, size: int) -> Slot:
        """The next buffer, of at least `size` bytes."""
        if len(self.slots) < DEPTH:
            self.slots.append(Slot(self.machine.pinned(size), self.machine.event()))
        slot = self.slots[self.turn]
        self.turn = (self.turn + 1) % DEPTH
        slot.done.synchronize()
        if len(slot.buffer) < size:
            slot.buffer = self.machine.pinned(max(size, 2 * len(slot.buffer)))
        slot.lap += 1
        return slot


def aligned(size: int) -> int:
    """The next multiple of ALIGNED."""
    return -(-size // ALIGNED) * ALIGNED


def piece(buffer: torch.Tensor, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Bytes of a buffer, from `start` on, as a tensor: a view."""
    length = dtype.itemsize * torch.Size(shape).numel()
    return buffer[start : start + length].view(dtype).view(shape)
