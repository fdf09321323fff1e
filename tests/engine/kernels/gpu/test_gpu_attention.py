"""Attention over the paged pool against the reference, and promise 2: a token's bits depend on what it sees alone."""

from __future__ import annotations

import pytest
import torch
from ragged import BF16, F16, F32, batch_of, bits, check, moved, random

from engine.kernels.batch import RaggedBatch, offsets
from engine.kernels.gpu.attention import SPLIT, attention_calls, plan_attention, tile_of
from engine.kernels.reference_attention import attend
from engine.kernels.reference_attention import plan_attention as reference_plan

KEYS = tile_of(64, BF16).keys
Pool = tuple[torch.Tensor, torch.Tensor]


def pool_of(batch: RaggedBatch, slots: int, heads: int, dim: int, dtype: torch.dtype, seed: int = 1) -> Pool:
    """Keys and values where the batch reads, NaN elsewhere."""
    made = []
    for i in range(2):
        tensor = torch.full((heads, slots, dim), torch.nan, dtype=dtype)
        tensor[:, batch.context_slots] = random(seed + i, heads, len(batch.context_slots), dim, dtype=dtype)
        made.append(tensor)
    return made[0], made[1]


def run(
    batch: RaggedBatch, queries: torch.Tensor, pool: Pool, window: int | None, device: torch.device, causal: bool = True
) -> torch.Tensor:
    there = [tensor.to(device) for tensor in (queries, *pool)]
    out = torch.full_like(there[0], torch.nan)
    plan = plan_attention(moved(batch, device), causal=causal)
    for call in attention_calls(there[0], there[1], there[2], 0.3, window, plan, out):
        call.run()
    return out.cpu()


def expected(
    batch: RaggedBatch, queries: torch.Tensor, pool: Pool, window: int | None, causal: bool = True
) -> torch.Tensor:
    plan = reference_plan(batch, window, causal=causal)
    return attend(plan, queries.double(), *(side.double() for side in pool), 0.3).view(queries.shape)


@pytest.mark.parametrize(
    ("dim", "heads", "group", "window", "new", "cached"),
    [
        (64, 1, 3, None, [1, 1, 1, 1], [0, KEYS - 1, KEYS, SPLIT + 3]),
        (80, 2, 1, None, [5, 1, 2], [0, 1, 70]),
        (96, 1, 7, 40, [20, 1, 1], [60, 90, 3]),
        (128, 1, 4, None, [18, 1], [SPLIT - 9, 2]),
        (256, 1, 2, 5, [3, 1], [0, 20]),
        (12, 2, 3, 1, [4, 1], [3, 9]),
        (16, 1, 7, SPLIT, [2, 1], [SPLIT + 10, 2 * SPLIT]),
    ],
)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_ragged_batches(
    dtype: torch.dtype, dim: int, heads: int, group: int, window: int | None, new: list[int], cached: list[int],
    device: torch.device,
) -> None:  # fmt: skip
    slots = sum(new) + sum(cached) + 9
    batch = batch_of(new, cached, slots)
    pool = pool_of(batch, slots, heads, dim, dtype)
    queries = random(7, batch.num_tokens, heads * group, dim, dtype=dtype)
    check(run(batch, queries, pool, window, device), expected(batch, queries, pool, window), dtype)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_both_directions(dtype: torch.dtype, device: torch.device) -> None:
    batch = batch_of([1, 2, KEYS + 1, 30], [0, 0, 0, 0], 200)
    pool = pool_of(batch, 200, 2, 12, dtype)
    queries = random(3, batch.num_tokens, 2, 12, dtype=dtype)
    found = run(batch, queries, pool, None, device, causal=False)
    check(found, expected(batch, queries, pool, None, causal=False), dtype)


def test_the_pool_may_be_of_another_dtype(device: torch.device) -> None:
    batch = batch_of([3, 1], [4, 30], 60)
    pool = pool_of(batch, 60, 1, 16, F32)
    queries = random(3, batch.num_tokens, 2, 16, dtype=BF16)
    check(run(batch, queries, pool, None, device), expected(batch, queries, pool, None), BF16)


def part(batch: RaggedBatch, pieces: list[tuple[int, int, int]]) -> tuple[RaggedBatch, torch.Tensor]:
    """Some new tokens of a batch's sequences as a step of its own: (sequence, first, stop) by index in the context.

    Returns the step, and which rows of the batch its tokens are.
    """
    rows, contexts = [], []
    for sequence, first, stop in pieces:
        shift = batch.query_starts[sequence + 1] - batch.context_lengths[sequence]
        rows += range(first + shift, stop + shift)
        base = batch.context_starts[sequence]
        contexts.append(batch.context_slots[base : base + stop])
    lengths = tuple(len(context) for context in contexts)
    chosen = torch.tensor(rows)
    step = RaggedBatch(
        token_ids=batch.token_ids[chosen],
        positions=batch.positions[chosen],
        slots=batch.slots[chosen],
        query_starts=offsets(tuple(stop - first for _, first, stop in pieces)),
        context_lengths=lengths,
        context_slots=torch.cat(contexts),
        context_starts=offsets(lengths),
    )
    return step, chosen


@pytest.mark.parametrize(("group", "window"), [(3, None), (1, 70), (7, None)])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_neither_company_nor_cuts_change_a_bit(
    dtype: torch.dtype, group: int, window: int | None, device: torch.device
) -> None:
    """A token comes out the same whether it is decoded or in a chunk, of whatever size, and beside whatever."""
    cached, heads, dim = SPLIT - 45, 1, 16
    stop = SPLIT + KEYS + 3
    batch = batch_of([stop - cached, 20, 1], [cached, 9, 40], 500)
    pool = pool_of(batch, 500, heads, dim, dtype)
    queries = random(7, batch.num_tokens, heads * group, dim, dtype=dtype)
    whole = run(batch, queries, pool, window, device)
    steps = [
        [(0, cached, cached + 20)],
        [(1, 9, 12), (0, cached + 20, SPLIT + 5), (2, 40, 41)],
        [(0, SPLIT + 5, SPLIT + 6), (1, 12, 13)],
        [(1, 13, 29), (0, SPLIT + 6, stop - 2)],
        [(0, stop - 2, stop - 1), (0, SPLIT - 1, SPLIT), (0, SPLIT, SPLIT + 1)],
        [(2, 40, 41), (0, stop - 1, stop), (0, SPLIT + KEYS - 1, SPLIT + KEYS), (0, SPLIT + KEYS, SPLIT + KEYS + 1)],
    ]
    for pieces in steps:
        step, rows = part(batch, pieces)
        found = run(step, queries[rows], pool, window, device)
        assert bits(found) == bits(whole[rows]), f"{pieces}: {(found - whole[rows]).abs().max()}"


def test_too_many_query_heads_are_refused() -> None:
    batch = batch_of([1], [0], 2)
    queries, pool = torch.zeros(1, 65, 16, dtype=BF16), torch.zeros(1, 2, 16, dtype=BF16)
    with pytest.raises(ValueError, match="65 query heads share a key head; at most 64"):
        attention_calls(queries, pool, pool, 1.0, None, plan_attention(batch, causal=True), queries)
