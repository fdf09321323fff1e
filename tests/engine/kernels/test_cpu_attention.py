"""Attention of the cpu backend on each ISA: against the reference in float64, and bit for bit against itself with other
company, on other numbers of threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from backends import BFLOAT16_ISAS, ISAS
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import BF16, BFLOAT16_STEP, F16, F32, batch_of, buffer, check_close, kind_id, random, read, run_batch, team

from engine.kernels import _cpu, reference
from engine.kernels.packed import DTYPES
from engine.kernels.record import PANEL

Sequences = list[tuple[int, list[int]]]
"""Of each sequence the number of new tokens, and the slots of its context with them."""

KINDS = [
    *[(isa, F32, pool) for isa in ISAS for pool in (F32, F16, BF16)],
    *[(isa, BF16, BF16) for isa in BFLOAT16_ISAS],
]
"""ISA, dtype of queries, dtype of the pool: all that a recorder asks for."""
kinds = pytest.mark.parametrize(("isa", "dtype", "pool_dtype"), KINDS, ids=kind_id)
plain_kinds = pytest.mark.parametrize(
    ("isa", "dtype", "pool_dtype"), [kind for kind in KINDS if kind[1] == kind[2]], ids=kind_id
)


@dataclass(frozen=True)
class Shape:
    kv_heads: int = 2
    group: int = 3
    head_dim: int = 32
    window: int | None = None
    causal: bool = True

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def scale(self) -> float:
        return 2 * self.head_dim**-0.5


class Slots:
    """Hands out scattered slots of a pool."""

    def __init__(self, count: int, seed: int) -> None:
        self.left = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()

    def take(self, count: int) -> list[int]:
        taken, self.left = self.left[:count], self.left[count:]
        assert len(taken) == count
        return taken


def pools(shape: Shape, dtype: torch.dtype, slots: int, used: Sequence[int], seed: int) -> list[torch.Tensor]:
    """Keys and values as a layer in the middle of a pool: NaN where nothing was written."""
    made = []
    for i in range(2):
        pool = torch.full((3, shape.kv_heads, slots, shape.head_dim), torch.nan, dtype=dtype)
        rows = random(seed + i, shape.kv_heads, len(used), shape.head_dim, dtype=dtype)
        pool[1][:, torch.tensor(used)] = rows
        made.append(pool[1])
    return made


def attend(
    isa: str, threads: int, shape: Shape, sequences: Sequences, queries: torch.Tensor, layer: list[torch.Tensor],
    out: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """queries [T, Q, D] → [T, Q D]."""
    plan = _cpu.Plan(team(isa, threads), isa)
    keys, values = layer
    tokens, padded = len(queries), -(-shape.head_dim // PANEL) * PANEL
    rows = torch.zeros(tokens, shape.heads, padded)
    rows[..., : shape.head_dim] = queries
    source = buffer(plan, shape.heads * padded, queries.dtype, rows.view(tokens, -1))
    target = buffer(plan, shape.heads * shape.head_dim, out)
    plan.attention(
        source, keys.data_ptr(), values.data_ptr(), DTYPES[keys.dtype], keys.stride(1) * keys.itemsize,
        keys.stride(0) * keys.itemsize, target, shape.scale, shape.heads, shape.kv_heads, shape.head_dim,
        shape.window or 0, shape.causal,
    )  # fmt: skip
    run_batch(plan, batch_of(sequences))
    return read(plan, target, tokens)


def check(
    isa: str, dtype: torch.dtype, pool_dtype: torch.dtype, shape: Shape, sequences: Sequences, seed: int = 0,
    alone: int = 3, out: torch.dtype = F32,
) -> None:  # fmt: skip
    """alone: how many of the sequences are computed alone as well."""
    used = sorted({slot for _, slots in sequences for slot in slots})
    layer = pools(shape, pool_dtype, max(used) + 7, used, seed)
    batch = batch_of(sequences)
    queries = random(seed + 2, batch.num_tokens, shape.heads, shape.head_dim, dtype=dtype)
    found = attend(isa, 2, shape, sequences, queries, layer, out)

    step = reference.begin_step(batch, (), shape.kv_heads, (shape.window,), causal=shape.causal)
    exact_layer = [pool.double() for pool in layer]
    expected = reference.attention(queries.double(), *exact_layer, shape.scale, shape.window, step)
    largest = float(exact_layer[1].nan_to_num().abs().max())
    # Weights of bfloat16 are each off by a rounding, and so is what they are divided by.
    allowed = largest * (2 * BFLOAT16_STEP if dtype == BF16 else 2e-5) + 1e-6
    check_close(found, expected, allowed + (1.01 * BFLOAT16_STEP * expected.abs() if out == BF16 else 0))
    typical = (found.double() - expected).abs().mean()
    assert typical < largest * (BFLOAT16_STEP / 4 if BF16 in (dtype, out) else 1e-6)

    assert torch.equal(attend(isa, 1, shape, sequences, queries, layer, out), found)
    chosen = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed))[:alone].tolist()
    for number in chosen:
        first, last = batch.query_starts[number], batch.query_starts[number + 1]
        again = attend(isa, 3, shape, [sequences[number]], queries[first:last], layer, out)
        assert torch.equal(again, found[first:last]), f"sequence {number} of {len(sequences)} alone"


def separate(lengths: Sequence[tuple[int, int]], seed: int = 0) -> Sequences:
    """Sequences of (new, cached) tokens that share nothing."""
    slots = Slots(sum(map(sum, lengths)) + 9, seed)
    return [(new, slots.take(new + cached)) for new, cached in lengths]


def forked(trunk: int, branches: Sequence[tuple[int, Sequence[tuple[int, int]]]], seed: int = 0) -> Sequences:
    """All share `trunk` slots; those of each branch share its own length beyond it; then (new, cached) of their own."""
    total = trunk + sum(length + sum(map(sum, leaves)) for length, leaves in branches)
    slots = Slots(total + 9, seed)
    common = slots.take(trunk)
    made = []
    for length, leaves in branches:
        stem = common + slots.take(length)
        made += [(new, stem + slots.take(new + cached)) for new, cached in leaves]
    order = torch.randperm(len(made), generator=torch.Generator().manual_seed(seed)).tolist()
    return [made[i] for i in order]


LEAVES = st.lists(st.tuples(st.sampled_from([1, 1, 1, 2, 9, 40]), st.integers(0, 150)), min_size=1, max_size=5)
STEMS = st.sampled_from([0, 1, 100, 127, 128, 129, 256, 300])


@kinds
@settings(max_examples=15, deadline=None)
@given(
    trunk=STEMS, branches=st.lists(st.tuples(STEMS, LEAVES), min_size=1, max_size=3), kv_heads=st.integers(1, 3),
    group=st.integers(1, 9), head_dim=st.sampled_from([4, 5, 18, 32, 64, 80, 128]),
    window=st.sampled_from([None, None, 1, 7, 128, 129, 200]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_any_company(
    isa: str, dtype: torch.dtype, pool_dtype: torch.dtype, trunk: int, branches: Any, seed: int, **shape: Any
) -> None:
    check(isa, dtype, pool_dtype, Shape(**shape), forked(trunk, branches, seed), seed)


@kinds
@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([1, 1, 2, 9, 12, 33, 97, 127, 128, 129, 300]), min_size=1, max_size=8),
    kv_heads=st.integers(1, 3), group=st.integers(1, 3), head_dim=st.sampled_from([5, 20, 32, 64, 80]),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_every_token_sees_all(
    isa: str, dtype: torch.dtype, pool_dtype: torch.dtype, lengths: list[int], seed: int, **shape: Any
) -> None:
    check(isa, dtype, pool_dtype, Shape(causal=False, **shape), separate([(n, 0) for n in lengths], seed), seed)


@kinds
def test_every_token_of_long_and_of_many_sequences_sees_all(
    isa: str, dtype: torch.dtype, pool_dtype: torch.dtype
) -> None:
    for lengths in ([1200, 3, 5, 513], [7 + 13 * i % 20 for i in range(60)]):
        sequences = separate([(n, 0) for n in lengths])
        check(isa, dtype, pool_dtype, Shape(2, 1, 32, causal=False), sequences, alone=5)


def test_all_that_is_seen_against_a_naive_softmax() -> None:
    shape, sequences = Shape(2, 2, 16, causal=False), separate([(7, 0), (1, 0), (130, 0)])
    layer, batch = pools(shape, F32, 200, range(200), 1), batch_of(sequences)
    queries = random(3, batch.num_tokens, shape.heads, shape.head_dim)
    expected = torch.zeros(batch.num_tokens, shape.heads, shape.head_dim, dtype=torch.float64)
    for number, (_, slots) in enumerate(sequences):
        rows = slice(*batch.query_starts[number : number + 2])
        for head in range(shape.heads):
            keys, values = (pool[head // shape.group, slots].double() for pool in layer)
            weights = (queries[rows, head].double() @ keys.T * shape.scale).softmax(dim=-1)
            expected[rows, head] = weights @ values
    for isa in ISAS:
        found = attend(isa, 2, shape, sequences, queries, layer, F32)
        check_close(found, expected.flatten(1), 1e-5)


@kinds
def test_one_key(isa: str, dtype: torch.dtype, pool_dtype: torch.dtype) -> None:
    check(isa, dtype, pool_dtype, Shape(), [(1, [5])])


@kinds
def test_thousands_of_keys(isa: str, dtype: torch.dtype, pool_dtype: torch.dtype) -> None:
    sequences = separate([(1, 8191), (5, 4000), (1, 0), (64, 3000), (1, 8192), (300, 0)])
    check(isa, dtype, pool_dtype, Shape(1, 2, 64), sequences, alone=6)
    check(isa, dtype, pool_dtype, Shape(1, 2, 64, window=1000), sequences, alone=6)


@plain_kinds
def test_ends_on_bounds_of_blocks(isa: str, dtype: torch.dtype, pool_dtype: torch.dtype) -> None:
    for length in (127, 128, 129, 256, 257, 384):
        sequences = separate([(new, length - new) for new in (1, 2, 8, 9, 33, 97, 127)])
        for window in (None, 64, 128):
            check(isa, dtype, pool_dtype, Shape(window=window), sequences, alone=2)


@plain_kinds
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 97, 100])
def test_heads_that_share_keys(isa: str, dtype: torch.dtype, pool_dtype: torch.dtype, group: int) -> None:
    sequences = forked(130, [(0, [(1, 0), (1, 20), (1, 130), (70, 10)]), (128, [(1, 0), (1, 0)])])
    check(isa, dtype, pool_dtype, Shape(1 if group > 16 else 2, group, 32), sequences, alone=6)


@kinds
@pytest.mark.parametrize("head_dim", [4, 8, 30, 64, 96, 112, 192, 256])
def test_head_sizes(isa: str, dtype: torch.dtype, pool_dtype: torch.dtype, head_dim: int) -> None:
    sequences = forked(256, [(0, [(1, 0), (1, 5), (20, 130)])])
    check(isa, dtype, pool_dtype, Shape(2, 2, head_dim), sequences)


@plain_kinds
@pytest.mark.parametrize("sharers", [2, 3, 13, 40])
def test_shared_prefixes(isa: str, dtype: torch.dtype, pool_dtype: torch.dtype, sharers: int) -> None:
    for trunk in (128, 500, 1000):
        leaves = [(1, 37 * i % 300) for i in range(sharers)]
        check(isa, dtype, pool_dtype, Shape(1, 3, 64), forked(trunk, [(0, leaves)]))


@plain_kinds
def test_prefixes_within_prefixes(isa: str, dtype: torch.dtype, pool_dtype: torch.dtype) -> None:
    few, many = [(1, 0), (1, 127), (1, 128), (2, 3)], [(1, 11 * i) for i in range(9)]
    sequences = forked(256, [(0, few), (128, many), (384, few), (300, many), (128, [(1, 0)]), (1, few)])
    check(isa, dtype, pool_dtype, Shape(2, 3, 64), sequences, alone=len(sequences))
    # One sequence's context may be another's prefix, to its last token.
    longest = sequences[0][1] + list(range(5000, 5200))
    nested = [(1, longest[: 128 * i + 1]) for i in range(1, len(longest) // 128)]
    check(isa, dtype, pool_dtype, Shape(2, 3, 64), nested, alone=len(nested))


@pytest.mark.parametrize("isa", BFLOAT16_ISAS)
def test_rounded_to_bfloat16(isa: str) -> None:
    for head_dim in (5, 32, 80):
        check(isa, BF16, BF16, Shape(2, 3, head_dim), separate([(1, 300), (40, 100)]), out=BF16)


def test_large_scores() -> None:
    """Scores of thousands: the weights of all keys but the best vanish, nothing overflows."""
    for isa in ISAS:
        shape = Shape(1, 1, 32)
        layer = pools(shape, F32, 300, range(300), 1)
        queries = random(2, 1, 1, 32) * 1e4
        found = attend(isa, 2, shape, [(1, list(range(300)))], queries, layer, F32)
        scores = (queries[0].double() @ layer[0][0].double().T)[0]
        check_close(found[0], layer[1][0][int(scores.argmax())], 1e-6)
