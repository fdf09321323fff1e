"""Paged attention over a ragged batch in plain torch: what to read is planned once a step, then done in each layer.

Sequences with one new token (decodes) of similar context length are padded to one length and attended together;
each longer run of new tokens (a prefill chunk) is attended alone, a block of queries at a time, over
just the keys that the block can see.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from engine.kernels.batch import RaggedBatch

# Queries attended at once: bounds the mask's memory and lets a block skip the keys that come after it.
QUERY_BLOCK = 256
# Keys, padding included, gathered at once for decodes: a copy that stays in the CPU's cache.
DECODE_GROUP_KEYS = 2048
# Contexts up to this length are padded to each other whatever their ratio; longer ones to at most twice theirs.
SHORT_CONTEXT = 128


@dataclass(frozen=True, eq=False)
class DecodeGroup:
    """n decodes. rows: int64 [n] of the batch. gather: int64 [n, longest], the slots that they read.

    visible: bool [n, 1, 1, longest], or None where all contexts have one length.
    """

    rows: torch.Tensor
    gather: torch.Tensor
    visible: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class QueryBlock:
    """Queries [start, stop) of the batch, which read the keys [first_key, last_key) of their chunk's.

    visible: bool [queries or 1, keys]; None: query i sees the keys up to i and there are as many keys as queries.
    """

    start: int
    stop: int
    first_key: int
    last_key: int
    visible: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Chunk:
    """One sequence's run of new tokens. gather: int64 [keys], the slots of all that its blocks read."""

    gather: torch.Tensor
    blocks: tuple[QueryBlock, ...]


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    decodes: tuple[DecodeGroup, ...]
    chunks: tuple[Chunk, ...]


def plan_attention(batch: RaggedBatch, window: int | None, *, causal: bool = True) -> AttentionPlan:
    """Which queries of `batch` read which keys together, under a sliding window or none.

    causal: False: all queries of a sequence see all its keys; there is no window then.
    """
    decodes: list[tuple[int, int]] = []  # (keys to read, sequence)
    chunks: list[Chunk] = []
    for sequence, length in enumerate(batch.context_lengths):
        if batch.query_starts[sequence + 1] - batch.query_starts[sequence] == 1:
            decodes.append((length if window is None else min(length, window), sequence))
        else:
            chunks.append(_plan_chunk(batch, sequence, window) if causal else _plan_whole(batch, sequence))
    groups = tuple(_plan_decodes(batch, group) for group in _similar_lengths(decodes))
    return AttentionPlan(groups, tuple(chunks))


def _similar_lengths(decodes: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Group decodes so that padding each to its group's longest wastes little."""
    groups: list[list[tuple[int, int]]] = []
    for length, sequence in sorted(decodes, reverse=True):
        longest = groups[-1][0][0] if groups else 0
        fits = groups and (len(groups[-1]) + 1) * longest <= DECODE_GROUP_KEYS
        if fits and (longest <= SHORT_CONTEXT or longest <= 2 * length):
            groups[-1].append((length, sequence))
        else:
            groups.append([(length, sequence)])
    return groups


def _plan_decodes(batch: RaggedBatch, group: list[tuple[int, int]]) -> DecodeGroup:
    device = batch.context_slots.device
    longest, shortest = group[0][0], group[-1][0]
    rows = torch.tensor([batch.query_starts[sequence] for _, sequence in group], device=device)
    stops = torch.tensor([batch.context_starts[sequence + 1] for _, sequence in group], device=device)
    lengths = torch.tensor([length for length, _ in group], device=device)[:, None]
    column = torch.arange(longest, device=device)
    # Padding repeats the last key: it is masked, but must be a slot that has been written.
    keys = stops[:, None] - lengths + torch.minimum(column, lengths - 1)
    visible = None if longest == shortest else (column < lengths)[:, None, None, :]
    return DecodeGroup(rows, batch.context_slots[keys], visible)


def _plan_chunk(batch: RaggedBatch, sequence: int, window: int | None) -> Chunk:
    start, stop = batch.query_starts[sequence], batch.query_starts[sequence + 1]
    length, base = batch.context_lengths[sequence], batch.context_starts[sequence]
    cached = length - (stop - start)
    skipped = 0 if window is None else max(0, cached + 1 - window)  # keys that no query of this chunk sees
    blocks = []
    for first in range(0, stop - start, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, stop - start)
        first_key = 0 if window is None else max(0, cached + first + 1 - window)
        last_key = cached + last
        visible = None
        if first_key < cached + first or window is not None:
            query = torch.arange(cached + first, last_key, device=batch.context_slots.device)[:, None]
            key = torch.arange(first_key, last_key, device=batch.context_slots.device)
            visible = key <= query
            if window is not None:
                visible &= key > query - window
        blocks.append(QueryBlock(start + first, start + last, first_key - skipped, last_key - skipped, visible))
    slots = batch.context_slots[base + skipped : base + length]
    return Chunk(slots, tuple(blocks))


def _plan_whole(batch: RaggedBatch, sequence: int) -> Chunk:
    """All keys of a sequence, seen by all its queries."""
    base, length = batch.context_starts[sequence], batch.context_lengths[sequence]
    slots = batch.context_slots[base : base + length]
    everything = torch.ones((1, length), dtype=torch.bool, device=slots.device)
    block = QueryBlock(batch.query_starts[sequence], batch.query_starts[sequence + 1], 0, length, everything)
    return Chunk(slots, (block,))


def attend(
    plan: AttentionPlan, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """queries: [T, Q, D]; keys, values: [K, slots, D] → [T, Q D]. Scores and softmax are float32 inside."""
    output = torch.empty_like(queries, memory_format=torch.contiguous_format)
    for group in plan.decodes:
        _attend_decodes(group, queries, keys, values, scale, output)
    for chunk in plan.chunks:
        _attend_chunk(chunk, queries, keys, values, scale, output)
    return output.view(queries.shape[0], -1)


def _attend_decodes(
    group: DecodeGroup,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    output: torch.Tensor,
) -> None:
    count, kv_heads, head_dim = len(group.rows), keys.shape[0], keys.shape[2]
    # The query heads that share a key head stand where several queries would: all of them see the same keys.
    grouped = queries[group.rows].view(count, kv_heads, -1, head_dim)
    group_keys, group_values = (
        _gather(pool, group.gather.view(-1), queries.dtype).view(kv_heads, count, -1, head_dim).transpose(0, 1)
        for pool in (keys, values)
    )
    result = functional.scaled_dot_product_attention(
        grouped, group_keys, group_values, attn_mask=group.visible, scale=scale
    )
    output[group.rows] = result.reshape(count, -1, head_dim)


def _attend_chunk(
    chunk: Chunk,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    output: torch.Tensor,
) -> None:
    chunk_keys, chunk_values = (_gather(pool, chunk.gather, queries.dtype) for pool in (keys, values))
    for block in chunk.blocks:
        result = functional.scaled_dot_product_attention(
            queries[block.start : block.stop].transpose(0, 1)[None],
            chunk_keys[None, :, block.first_key : block.last_key],
            chunk_values[None, :, block.first_key : block.last_key],
            attn_mask=block.visible,
            is_causal=block.visible is None,
            scale=scale,
            enable_gqa=True,
        )
        output[block.start : block.stop] = result[0].transpose(0, 1)


def _gather(pool: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Slots [n] of a pool [K, slots, D] → [K, n, D]."""
    return pool.index_select(1, slots).to(dtype)
