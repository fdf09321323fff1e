"""Attention's work: which tiles and splits there are in a step, and how they are launched."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from engine.kernels.batch import RaggedBatch
from engine.kernels.gpu.device import attention as kernels
from engine.kernels.gpu.launch import Call, as_tensor, power_of_two
from engine.kernels.table import Integers

# Context positions that a decode's program sums: 2,048 tokens then keep 8 programs a key head busy, and what a program
# leaves for the merge, some 0.5 KB a query head, is a fiftieth of what it reads.
SPLIT = 256
# All that a token can see, where there is no window.
EVERYTHING = 1 << 30
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tile:
    """rows: of queries, each a token with one of its heads. keys: read at once. The rest: see `launch.Call`."""

    rows: int
    keys: int
    warps: int
    stages: int


def tile_of(head_dim: int, dtype: torch.dtype) -> Tile:
    """One tile serves prefill and decode, so that both give the same bits.

    With 64 rows a decode still waits for memory (64 multiply-adds a key's byte, where an H100 can do some 300), and a
    prefill reads a context once for 64 / group tokens. Wide or precise heads take fewer rows and keys: with more, their
    sums would not fit the registers (`docs/gpu.md` has the table).
    """
    wide = power_of_two(head_dim)
    if dtype == torch.float32:
        return Tile(rows=16, keys=32 if wide == 128 else 16, warps=4 if wide <= 128 else 8, stages=1)
    if wide > 128:
        return Tile(rows=32, keys=32, warps=8, stages=2)
    return Tile(rows=64, keys=64, warps=4 if wide <= 32 else 8, stages=2)


@dataclass(frozen=True, eq=False)
class Work:
    """What `attend` does: items int32 [n, 3] on the device, of each its sequence, the row of its first token, and its
    first split. count: int32 [1], how many of them there are; the others are not looked at. programs: that share them.

    decodes: int32 [d, 3], of each decode its sequence, its row, and the item of its first split, as the items are
    splits of decodes; None for tiles that fold their splits themselves.
    """

    items: torch.Tensor
    count: torch.Tensor
    programs: int
    decodes: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Where the step's sequences lie: query_starts, context_starts int32 [S + 1], context_slots int64, on the device.

    decodes: of the sequences with one new token, None where there are none. longer: the others and where their tokens
    start and stop, int32 [n, 3] on the host. tiles: of these, by the number of tokens that a tile holds.
    """

    query_starts: torch.Tensor
    context_starts: torch.Tensor
    context_slots: torch.Tensor
    causal: bool
    decodes: Work | None
    longer: Integers
    tiles: dict[int, Work] = field(default_factory=dict)


def plan_attention(batch: RaggedBatch, *, causal: bool) -> AttentionPlan:
    device = batch.context_slots.device
    starts = np.array(batch.query_starts, np.int32)
    counts = np.diff(starts)
    single, longer = (np.flatnonzero(chosen).astype(np.int32) for chosen in (counts == 1, counts > 1))
    decodes = None
    if len(single):
        items, firsts = split_items(single, starts[single], np.array(batch.context_lengths, np.int32)[single])
        decodes = _work(items, device, np.stack((single, starts[single], firsts), 1))
    return AttentionPlan(
        as_tensor(starts, torch.int32, device),
        as_tensor(batch.context_starts, torch.int32, device),
        batch.context_slots,
        causal,
        decodes,
        np.stack((longer, starts[longer], starts[longer + 1]), 1),
    )


def split_items(sequences: Integers, rows: Integers, lengths: Integers) -> tuple[Integers, Integers]:
    """The splits of some decodes as items, int32 [n, 3], and which of them is the first of each, int32 [d]."""
    return _repeated(-(-lengths // SPLIT), sequences, rows)


def tiles_of(plan: AttentionPlan, tokens_each: int) -> Work | None:
    """Tiles of the sequences with more than one new token."""
    if not len(plan.longer):
        return None
    if tokens_each not in plan.tiles:
        sequences, starts, stops = plan.longer.T
        items, _ = _repeated(-(-(stops - starts) // tokens_each), sequences, starts)
        items[:, 1] += items[:, 2] * tokens_each
        items[:, 2] = 0
        plan.tiles[tokens_each] = _work(items, plan.context_slots.device)
    return plan.tiles[tokens_each]


def _repeated(times: Integers, sequences: Integers, rows: Integers) -> tuple[Integers, Integers]:
    """Each sequence and row so many times, numbered from 0: int32 [n, 3]; and where each starts."""
    firsts = (np.cumsum(times) - times).astype(np.int32)
    owners = np.repeat(np.arange(len(times)), times)
    numbers = np.arange(len(owners), dtype=np.int32) - firsts[owners]
    return np.stack((sequences[owners], rows[owners], numbers), 1), firsts


def _work(items: Integers, device: torch.device, decodes: Integers | None = None) -> Work:
    """In one copy."""
    count = len(items)
    parts = [np.array([count]), items.ravel(), *([] if decodes is None else [decodes.ravel()])]
    there = as_tensor(np.concatenate(parts), torch.int32, device)
    listed = None if decodes is None else there[1 + 3 * count :].view(-1, 3)
    return Work(there[1 : 1 + 3 * count].view(-1, 3), there[:1], count, listed)


def attention_calls(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
    plan: AttentionPlan,
    output: torch.Tensor,
) -> list[Call]:
    """The launches for one layer: queries, output [T, Q, D]; keys, values [K, slots, D], each head contiguous.

    Raises ValueError where more query heads share a key head than a tile has rows.
    """
    heads, dim = keys.shape[0], keys.shape[2]
    group, tile = queries.shape[1] // heads, tile_of(dim, queries.dtype)
    if group > tile.rows:
        raise ValueError(f"{group} query heads share a key head; at most {tile.rows} may for heads of {dim} channels")
    calls = []
    for work in (plan.decodes, tiles_of(plan, tile.rows // group)):
        if work is not None:
            calls += _calls(queries, keys, values, scale, window, plan, work, tile, output)
    return calls


def _calls(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
    plan: AttentionPlan,
    work: Work,
    tile: Tile,
    output: torch.Tensor,
) -> list[Call]:
    heads, query_heads, dim = keys.shape[0], queries.shape[1], keys.shape[2]
    shape = {
        "HEADS": heads, "GROUP": query_heads // heads, "DIM": dim, "BLOCK_DIM": max(16, power_of_two(dim)),
        "SPLIT": SPLIT, "CAUSAL": plan.causal,
    }  # fmt: skip
    places = 0 if work.decodes is None else len(work.items) * query_heads
    shared = {
        "part_totals": torch.empty((places, dim), dtype=torch.float32, device=queries.device),
        "part_peaks": torch.empty((places, 2), dtype=torch.float32, device=queries.device),
        "query_starts": plan.query_starts, "context_starts": plan.context_starts, "output": output,
        "window": EVERYTHING if window is None else window,
    }  # fmt: skip
    own = {
        "queries": queries, "keys": keys, "values": values, "context_slots": plan.context_slots,
        "items": work.items, "item_count": work.count, "scale": scale * LOG2_E, "head_stride": keys.stride(0),
        "splits_each": EVERYTHING // SPLIT if work.decodes is None else 1, "in_parts": int(work.decodes is not None),
    }  # fmt: skip
    tile_shape = {"ROWS": tile.rows, "BLOCK_KEYS": tile.keys}
    grid = (work.programs, heads, 1)
    calls = [Call(kernels.attend, grid, shared | own, shape | tile_shape, tile.warps, tile.stages)]
    if work.decodes is not None:
        rows, count = {"ROWS": power_of_two(query_heads // heads)}, len(work.decodes)
        arguments = shared | {"decodes": work.decodes}
        calls.append(Call(kernels.merge, (count, heads, 1), arguments, shape | rows, warps=1, stages=3))
    return calls
