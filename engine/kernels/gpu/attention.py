"""Attention's tiles: which there are in a step, and how they are launched."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from engine.kernels.batch import RaggedBatch
from engine.kernels.gpu.device import attention as kernels
from engine.kernels.gpu.launch import Call, as_tensor, parts, power_of_two
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
    return Tile(rows=64, keys=64, warps=8, stages=2)


@dataclass(frozen=True, eq=False)
class Tiles:
    """sequences, tokens: int32 [n] on the device, of each tile its sequence and the row of its first token.

    splits: of the longest context among decodes, 0 for tiles that fold their splits themselves.
    """

    sequences: torch.Tensor
    tokens: torch.Tensor
    splits: int

    @property
    def count(self) -> int:
        return self.sequences.shape[0]


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Where the step's sequences lie: int32 [S + 1] on the device. tiles: of decodes and of longer runs, by the
    number of tokens that a tile holds."""

    batch: RaggedBatch
    query_starts: torch.Tensor
    context_starts: torch.Tensor
    causal: bool
    tiles: dict[int, tuple[Tiles, Tiles]] = field(default_factory=dict)


def plan_attention(batch: RaggedBatch, *, causal: bool) -> AttentionPlan:
    device = batch.context_slots.device
    query_starts = as_tensor(batch.query_starts, torch.int32, device)
    return AttentionPlan(batch, query_starts, as_tensor(batch.context_starts, torch.int32, device), causal)


def tiles_of(plan: AttentionPlan, tokens_each: int) -> tuple[Tiles, Tiles]:
    """Tiles of the sequences with one new token, and of the others."""
    if tokens_each not in plan.tiles:
        plan.tiles[tokens_each] = _cut(plan.batch, tokens_each)
    return plan.tiles[tokens_each]


def _cut(batch: RaggedBatch, tokens_each: int) -> tuple[Tiles, Tiles]:
    starts = np.array(batch.query_starts, np.int32)
    counts = np.diff(starts)
    decodes = np.flatnonzero(counts == 1).astype(np.int32)
    runs = np.flatnonzero(counts > 1).astype(np.int32)
    pieces = -(-counts[runs] // tokens_each)
    sequences = np.repeat(runs, pieces)
    before = np.arange(len(sequences)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    longest = max((batch.context_lengths[sequence] for sequence in decodes), default=0)
    device = batch.context_slots.device
    return (
        _tiles(decodes, starts[decodes], parts(longest, SPLIT), device),
        _tiles(sequences, starts[sequences] + before * tokens_each, 0, device),
    )


def _tiles(sequences: Integers, tokens: Any, splits: int, device: torch.device) -> Tiles:
    both = as_tensor(np.stack((sequences, tokens.astype(np.int32))), torch.int32, device)
    return Tiles(both[0], both[1], splits)


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
    for tiles in tiles_of(plan, tile.rows // group):
        if tiles.count:
            calls += _calls(queries, keys, values, scale, window, plan, tiles, tile, output)
    return calls


def _calls(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
    plan: AttentionPlan,
    tiles: Tiles,
    tile: Tile,
    output: torch.Tensor,
) -> list[Call]:
    heads, query_heads, dim = keys.shape[0], queries.shape[1], keys.shape[2]
    shape = {
        "HEADS": heads, "GROUP": query_heads // heads, "DIM": dim, "BLOCK_DIM": max(16, power_of_two(dim)),
        "SPLIT": SPLIT, "CAUSAL": plan.causal,
    }  # fmt: skip
    places = tiles.count * tiles.splits * query_heads
    shared = {
        "part_totals": torch.empty((places, dim), dtype=torch.float32, device=queries.device),
        "part_peaks": torch.empty((places, 2), dtype=torch.float32, device=queries.device),
        "query_starts": plan.query_starts, "context_starts": plan.context_starts,
        "tile_sequences": tiles.sequences, "tile_tokens": tiles.tokens, "output": output,
        "window": EVERYTHING if window is None else window, "part_splits": tiles.splits,
    }  # fmt: skip
    own = {
        "queries": queries, "keys": keys, "values": values, "context_slots": plan.batch.context_slots,
        "scale": scale * LOG2_E, "head_stride": keys.stride(0),
        "splits_each": 1 if tiles.splits else EVERYTHING // SPLIT,
    }  # fmt: skip
    tile_shape = {"ROWS": tile.rows, "BLOCK_KEYS": tile.keys}
    grid = (tiles.count, heads, max(1, tiles.splits))
    calls = [Call(kernels.attend, grid, shared | own, shape | tile_shape, tile.warps, tile.stages)]
    if tiles.splits:
        rows = {"ROWS": power_of_two(query_heads // heads)}
        calls.append(Call(kernels.merge, (tiles.count, heads, 1), shared, shape | rows, warps=1, stages=3))
    return calls
