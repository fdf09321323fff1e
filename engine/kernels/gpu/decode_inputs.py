"""What a captured decode reads of a step: at the same place always, written there in two copies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.kernels.batch import RaggedBatch
from engine.kernels.gpu.attention import SPLIT, split_items
from engine.kernels.gpu.launch import parts
from engine.kernels.gpu.ring import Ring, aligned, piece
from engine.kernels.table import Integers, Longs


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of what captured decodes are given: the most sequences, and the most context slots of all of them together."""

    sequences: int
    contexts: int

    @property
    def items(self) -> int:
        """Most splits that there can be."""
        return parts(self.contexts, SPLIT) + self.sequences


@dataclass(frozen=True, eq=False)
class Fields:
    """Views of one buffer, of B sequences, C context slots and I items (`Bounds`).

    int64: tokens, positions, slots, sources [B], context_slots [C]. int32: context_starts [B + 1], item_count [1],
    decodes [B, 3], items [I, 3]. See `RaggedBatch`, `attention.Work` and `queued.QueueingProgram.queue`.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    sources: torch.Tensor
    context_starts: torch.Tensor
    item_count: torch.Tensor
    decodes: torch.Tensor
    items: torch.Tensor
    context_slots: torch.Tensor


def _places(bounds: Bounds) -> tuple[dict[str, tuple[int, tuple[int, ...], torch.dtype]], int]:
    """Where each field starts, its shape and dtype; and the size of the buffer, bytes. The last two vary most in what
    is used of them."""
    count = bounds.sequences
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "tokens": ((count,), torch.int64), "positions": ((count,), torch.int64), "slots": ((count,), torch.int64),
        "sources": ((count,), torch.int64), "context_starts": ((count + 1,), torch.int32),
        "item_count": ((1,), torch.int32), "decodes": ((count, 3), torch.int32),
        "items": ((bounds.items, 3), torch.int32), "context_slots": ((bounds.contexts,), torch.int64),
    }  # fmt: skip
    found, start = {}, 0
    for name, (shape, dtype) in shapes.items():
        found[name] = (start, shape, dtype)
        start += aligned(dtype.itemsize * torch.Size(shape).numel())
    return found, start


def _fields(buffer: torch.Tensor, bounds: Bounds) -> Fields:
    places, _ = _places(bounds)
    return Fields(**{name: piece(buffer, *place) for name, place in places.items()})


@dataclass(frozen=True, eq=False)
class DecodeInputs:
    """The buffer on the device with its fields, and the host's buffers that steps are written to."""

    bounds: Bounds
    buffer: torch.Tensor
    fields: Fields
    ring: Ring

    def write(self, batch: RaggedBatch, sources: Longs, items: tuple[Integers, Integers], size: int) -> None:
        """Queue the copies for a step that is filled up to `size` sequences. items: what `items_of` has found.

        Those that fill it up have no context, no item, and no slot (-1).
        """
        slot = self.ring.take(len(self.buffer))
        _fill(_fields(slot.buffer, self.bounds), batch, sources, items, size)
        places, _ = _places(self.bounds)
        listed, contexts = places["items"][0] + items[0].nbytes, places["context_slots"][0]
        for start, stop in ((0, listed), (contexts, contexts + 8 * batch.context_starts[-1])):
            self.buffer[start:stop].copy_(slot.buffer[start:stop], non_blocking=True)
        slot.done.record()


def open_inputs(bounds: Bounds, device: torch.device, ring: Ring) -> DecodeInputs:
    """As of a step that only consists of filling."""
    _, size = _places(bounds)
    buffer = torch.zeros(size, dtype=torch.uint8, device=device)
    fields = _fields(buffer, bounds)
    fields.slots.fill_(-1)
    fields.sources.fill_(-1)
    fields.decodes[:, :2] = torch.arange(bounds.sequences, dtype=torch.int32, device=device)[:, None]
    return DecodeInputs(bounds, buffer, fields, ring)


def items_of(batch: RaggedBatch) -> tuple[Integers, Integers]:
    """The splits of a batch of decodes, and the first of each: see `attention.split_items`."""
    sequences = np.arange(batch.num_sequences, dtype=np.int32)
    return split_items(sequences, sequences, np.array(batch.context_lengths, np.int32))


def _fill(fields: Fields, batch: RaggedBatch, sources: Longs, items: tuple[Integers, Integers], size: int) -> None:
    count, (listed, firsts) = batch.num_sequences, items
    for field, given, filling in (
        (fields.tokens, batch.token_ids.numpy(), 0), (fields.positions, batch.positions.numpy(), 0),
        (fields.slots, batch.slots.numpy(), -1), (fields.sources, sources, -1),
        (fields.context_starts, np.array(batch.context_starts), batch.context_starts[-1]),
    ):  # fmt: skip
        array = field.numpy()
        array[: len(given)] = given
        array[len(given) : size + 1] = filling
    decodes = fields.decodes.numpy()
    decodes[:size, :2] = np.arange(size)[:, None]
    decodes[:count, 2] = firsts
    decodes[count:size, 2] = 0
    fields.item_count.numpy()[0] = len(listed)
    fields.items.numpy()[: len(listed)] = listed
    fields.context_slots.numpy()[: batch.context_starts[-1]] = batch.context_slots.numpy()
