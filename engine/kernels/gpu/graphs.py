"""Decodes as CUDA graphs: a step of one token each for up to so many sequences is one launch, not hundreds.

A graph is captured for each of some numbers of sequences, and of some numbers of splits of their contexts; a step takes
the smallest that holds it, and is filled up with sequences that have no context and write nothing. All graphs read
their inputs from one place, and leave hidden states and logits at one place. Rows are the same bits as without graphs:
each kernel is the same build, and knows its row alone.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch

from engine.kernels.batch import RaggedBatch
from engine.kernels.gpu.attention import SPLIT, AttentionPlan, Work
from engine.kernels.gpu.decode_inputs import Bounds, DecodeInputs, items_of, open_inputs
from engine.kernels.gpu.errors import device_errors
from engine.kernels.gpu.launch import parts
from engine.kernels.gpu.machine import Graph, Machine
from engine.kernels.gpu.ops import GpuOps
from engine.kernels.gpu.ring import Ring
from engine.kernels.kv_cache import KvCache
from engine.kernels.table import Integers, Longs, Ops, Rows
from engine.parallel.group import DeviceGroup

logger = logging.getLogger(__name__)

# Of splits that a graph is captured for each number is so many times the one before. A program without a split ends at
# once, in about a tenth of the time that one with a split takes.
_STEP = 4
# Contexts that share prefixes can be longer in all than the pool; steps beyond so many pools run without a graph.
_POOLS = 4


@dataclass(frozen=True, eq=False)
class DecodeGraph:
    """Serves up to `size` sequences with up to `items` splits in all. routed: what its mixtures of experts choose,
    int32 [size, top_k] each."""

    size: int
    items: int
    graph: Graph
    routed: list[torch.Tensor]


@dataclass(frozen=True, eq=False)
class DecodeGraphs:
    """hidden [B, H], logits float32 [B, V]: of the step replayed last. sampled: int64, what the last step has sampled,
    which a step may take tokens from. graphs: by size, each with the fewest items first."""

    inputs: DecodeInputs
    hidden: torch.Tensor
    logits: torch.Tensor
    sampled: torch.Tensor
    graphs: dict[int, list[DecodeGraph]] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(sorted(self.graphs))

    def replay(self, batch: RaggedBatch, rows: Rows, sources: Longs) -> DecodeGraph | None:
        """Queue a step on the host's batch, with the tokens that `sources` names (`queued.QueueingProgram.queue`).

        None, and nothing is queued, for a step that is no decode of all rows, or larger than all graphs.
        """
        if not _is_decode(batch, rows) or batch.context_starts[-1] > self.inputs.bounds.contexts:
            return None
        size = next((size for size in self.sizes if size >= batch.num_sequences), None)
        if size is None:
            return None
        items = items_of(batch)
        chosen = next((graph for graph in self.graphs[size] if graph.items >= len(items[0])), None)
        if chosen is not None:
            self.inputs.write(batch, sources, items, size)
            chosen.graph.replay()
        return chosen


def _is_decode(batch: RaggedBatch, rows: Rows) -> bool:
    count = batch.num_sequences
    return batch.num_tokens == count == len(rows) and batch.type_ids is None and bool((rows == np.arange(count)).all())


def ladder(most: int) -> tuple[int, ...]:
    """The numbers of sequences that graphs are captured for: closer where a step costs least."""
    steps = (1, 2, 4, *range(8, 32, 8), *range(32, 64, 16), *range(64, most, 32))
    return (*(step for step in steps if step < most), most)


def items_ladder(size: int, most: int) -> tuple[int, ...]:
    """The numbers of splits for `size` sequences: contexts of 512 tokens on average, four times that, and so on."""
    found = [min(2 * size, most)]
    while found[-1] < most:
        found.append(min(found[-1] * _STEP, most))
    return tuple(found)


@dataclass(frozen=True)
class Captured:
    """What is captured: a model's step and head over a pool."""

    step: Callable[[Ops, RaggedBatch, KvCache], Any]
    head: Callable[[Ops, Any], Any]
    cache: KvCache
    ops: GpuOps


def capture_decodes(
    captured: Captured,
    machine: Machine,
    ring: Ring,
    sizes: tuple[int, ...],
    running: int,
    longest: int,
    beat: Callable[[], None] = lambda: None,
) -> DecodeGraphs | None:
    """Graphs for so many sequences of at most `longest` tokens. running: most rows that any step samples. beat: called
    before each.

    The largest are captured first, since the others then fit into memory that these leave. A size that memory does not
    suffice for is left out with a warning; None where that is all. A step that a size is tried with first is run, which
    writes nothing to the pool, so that kernels are loaded and constants are on the device.

    Several ranks call this together and get the same sizes: sums are captured with the rest. Raises MemoryError where
    one of several cannot even try a size, as the others then wait for it.
    """
    most = max(sizes)
    contexts = max(most, min(most * longest, _POOLS * captured.cache.keys.shape[2]))
    inputs = open_inputs(Bounds(most, contexts), captured.ops.device, ring)
    sampled = torch.zeros(running, dtype=torch.int64, device=captured.ops.device)
    made: DecodeGraphs | None = None
    for size in sorted(sizes, reverse=True):
        try:
            beat()
            with device_errors():
                hidden, logits = _run(captured, inputs, sampled, size, size, captured.ops)
                made = made or DecodeGraphs(inputs, torch.empty_like(hidden), torch.empty_like(logits), sampled)
        except MemoryError as error:
            if captured.ops.group.size > 1:
                raise
            _warn(size, error)
            continue
        try:
            with device_errors():
                made.graphs[size] = _capture_size(captured, machine, made, size, longest, beat)
        except MemoryError as error:
            _warn(size, error)
    if made is None:
        return None
    _agree(captured.ops.group, made, sizes)
    return made if made.graphs else None


def _warn(size: int, error: MemoryError) -> None:
    logger.warning("The GPU's memory does not suffice for a CUDA graph of %d sequences: %s", size, error)


def _agree(group: DeviceGroup, made: DecodeGraphs, sizes: tuple[int, ...]) -> None:
    """Keep the sizes that all ranks have."""
    if group.size > 1:
        own = torch.tensor([size in made.graphs for size in sizes], dtype=torch.uint8)
        everywhere = group.all_gather(own.to(made.sampled.device)).amin(0).tolist()
        for size, kept in zip(sizes, everywhere, strict=True):
            if not kept:
                made.graphs.pop(size, None)


def _capture_size(
    captured: Captured, machine: Machine, into: DecodeGraphs, size: int, longest: int, beat: Callable[[], None]
) -> list[DecodeGraph]:
    most = min(size * parts(longest, SPLIT), parts(into.inputs.bounds.contexts, SPLIT) + size)
    found = []
    for items in reversed(items_ladder(size, most)):
        beat()
        ops = dataclasses.replace(captured.ops, routed=[])

        def work(items: int = items, ops: GpuOps = ops) -> None:
            hidden, logits = _run(captured, into.inputs, into.sampled, size, items, ops)
            into.hidden[:size].copy_(hidden)
            into.logits[:size].copy_(logits)

        found.append(DecodeGraph(size, items, machine.capture(work), ops.routed))
    return found[::-1]


def _run(
    captured: Captured, inputs: DecodeInputs, sampled: torch.Tensor, size: int, items: int, ops: GpuOps
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queue the step and its head on the inputs' place: hidden [size, H], logits [size, V]."""
    there, each = inputs.fields, tuple(range(size + 1))
    sources = there.sources[:size]
    tokens = torch.where(sources >= 0, sampled[sources.clamp(min=0)], there.tokens[:size])
    batch = RaggedBatch(
        tokens, there.positions[:size], there.slots[:size], each, (1,) * size, there.context_slots[:size], each
    )
    work = Work(there.items[:items], there.item_count, items, there.decodes[:size])
    nobody: Integers = np.empty((0, 3), np.int32)
    starts = torch.arange(size + 1, dtype=torch.int32, device=inputs.buffer.device)
    plan = AttentionPlan(starts, there.context_starts[: size + 1], there.context_slots, True, work, nobody)
    planned = cast(Ops, dataclasses.replace(ops, plan=plan))
    hidden = captured.step(planned, batch, captured.cache)
    return hidden, captured.head(planned, hidden)
