"""Each op of the torch reference against loops in float64."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.kernels import reference, reference_attention
from engine.kernels.batch import RaggedBatch, offsets
from engine.kernels.dense import DenseMatrix
from engine.kernels.kv_cache import KvCache
from engine.kernels.table import Ops, RotaryFrequencies

Array = NDArray[np.float64]
OPS: Ops = reference
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])
SIZES = st.integers(1, 19)
SEEDS = st.integers(0, 2**32 - 1)
EPS = 1e-5
STEP = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Relative size of a rounding."""


def random(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(tensor: torch.Tensor) -> Array:
    return np.asarray(tensor.double().numpy())


def check(result: torch.Tensor, expected: Array, dtype: torch.dtype, roundings: int = 2) -> None:
    """Equal but for a few roundings, relative to the largest entry."""
    assert result.dtype == dtype
    assert result.shape == expected.shape
    allowed = roundings * STEP[dtype] * max(1.0, float(np.abs(expected).max(initial=0)))
    assert np.abs(exact(result) - expected).max(initial=0) <= allowed


@given(DTYPES, SIZES, SIZES, st.integers(1, 40), SEEDS)
def test_embedding(dtype: torch.dtype, tokens: int, width: int, vocabulary: int, seed: int) -> None:
    weight = random(seed, vocabulary, width, dtype=dtype)
    ids = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
    result = OPS.embedding(ids, DenseMatrix(weight, None))
    assert result.shape == (tokens, width)
    assert all(torch.equal(result[i], weight[ids[i]]) for i in range(tokens))


@given(DTYPES, SIZES, SIZES, SIZES, st.booleans(), SEEDS)
def test_linear(dtype: torch.dtype, tokens: int, inputs: int, outputs: int, biased: bool, seed: int) -> None:
    x, weight = random(seed, tokens, inputs, dtype=dtype), random(seed + 1, outputs, inputs, dtype=dtype)
    bias = random(seed + 2, outputs, dtype=dtype) if biased else None
    expected = np.zeros((tokens, outputs))
    for t in range(tokens):
        for o in range(outputs):
            expected[t, o] = sum(exact(x)[t] * exact(weight)[o]) + (0 if bias is None else exact(bias)[o])
    check(OPS.linear(x, DenseMatrix(weight, bias)), expected, dtype)


def naive_rms_norm(row: Array, weight: Array) -> Array:
    return row / math.sqrt(sum(row * row) / len(row) + EPS) * weight


@given(DTYPES, SIZES, SIZES, st.booleans(), SEEDS)
def test_rms_norm(dtype: torch.dtype, tokens: int, width: int, carried: bool, seed: int) -> None:
    x, weight = random(seed, tokens, width, dtype=dtype), random(seed + 1, width, dtype=dtype)
    residual = random(seed + 2, tokens, width, dtype=dtype) if carried else None
    normed, total = OPS.rms_norm(x, residual, weight, EPS)
    check(total, exact(x) + (0 if residual is None else exact(residual)), dtype)
    # The sum is rounded before it is normed: judge the norm by the sum as it was returned.
    check(normed, np.stack([naive_rms_norm(row, exact(weight)) for row in exact(total)]), dtype, roundings=3)


@given(DTYPES, SIZES, SIZES, SIZES, st.booleans(), SEEDS)
def test_gated_linear(dtype: torch.dtype, tokens: int, inputs: int, width: int, biased: bool, seed: int) -> None:
    x, weight = random(seed, tokens, inputs, dtype=dtype), random(seed + 1, 2 * width, inputs, dtype=dtype)
    matrix = DenseMatrix(weight, random(seed + 2, 2 * width, dtype=dtype) if biased else None)
    gate_up = exact(OPS.linear(x, matrix))
    gate, up = gate_up[:, :width], gate_up[:, width:]
    check(OPS.gated_linear(x, matrix), gate / (1 + np.exp(-gate)) * up, dtype, roundings=3)


@given(DTYPES, SIZES, SIZES, st.integers(1, 50), SEEDS)
def test_logits_are_not_rounded_to_the_dtype(
    dtype: torch.dtype, rows: int, width: int, vocabulary: int, seed: int
) -> None:
    x, weight = random(seed, rows, width, dtype=dtype), random(seed + 1, vocabulary, width, dtype=dtype)
    with mock.patch.object(reference, "LOGITS_BLOCK", 7 * width):
        check(OPS.logits(x, DenseMatrix(weight, None)), exact(x) @ exact(weight).T, torch.float32, roundings=20)


def batch_of(queries: list[int], cached: list[int], slots: int, seed: int, shared: int = 0) -> RaggedBatch:
    """Sequences in scattered slots that share the first `shared` of them (where those are cached)."""
    generator = torch.Generator().manual_seed(seed)
    free = torch.randperm(slots, generator=generator)
    common, free = free[:shared], free[shared:]
    contexts = []
    for new, old in zip(queries, cached, strict=True):
        own = new + old - min(shared, old)
        contexts.append(torch.cat((common[: min(shared, old)], free[:own])))
        free = free[own:]
    lengths = tuple(len(context) for context in contexts)
    return RaggedBatch(
        token_ids=torch.zeros(sum(queries), dtype=torch.int64),
        positions=torch.cat([torch.arange(old, old + new) for new, old in zip(queries, cached, strict=True)]),
        slots=torch.cat([context[-new:] for context, new in zip(contexts, queries, strict=True)]),
        query_starts=offsets(tuple(queries)),
        context_lengths=lengths,
        context_slots=torch.cat(contexts),
        context_starts=offsets(lengths),
    )


@given(
    DTYPES, DTYPES, SIZES, st.integers(1, 4), st.integers(1, 3), st.sampled_from([2, 6, 7, 16]), st.booleans(),
    st.data(),
)  # fmt: skip
def test_rotary_store(
    dtype: torch.dtype, kv_dtype: torch.dtype, tokens: int, kv_heads: int, group: int, head_dim: int, normed: bool,
    data: st.DataObject,
) -> None:  # fmt: skip
    rotary_dim = 2 * data.draw(st.integers(1, head_dim // 2), "rotary_dim / 2")
    seed = data.draw(SEEDS, "seed")
    query_heads, slots = kv_heads * group, tokens + 5
    batch = batch_of([tokens], [3], slots, seed)
    rotary = RotaryFrequencies(random(seed, rotary_dim // 2, dtype=torch.float32).abs(), factor=1.25)
    qkv = random(seed + 1, tokens, (query_heads + 2 * kv_heads) * head_dim, dtype=dtype)
    norms = [random(seed + 2 + i, head_dim, dtype=dtype) if normed else None for i in range(2)]
    keys, values = (torch.full((kv_heads, slots, head_dim), 9.0, dtype=kv_dtype) for _ in range(2))
    step = OPS.begin_step(batch, (rotary,), kv_heads, (None,))
    queries = OPS.rotary_store(qkv, norms[0], norms[1], EPS, keys, values, 0, step)

    def rotated(head: Array, norm: torch.Tensor | None, position: int) -> Array:
        head = head if norm is None else naive_rms_norm(head, exact(norm))
        result, half = head.copy(), rotary_dim // 2
        for i in range(half):
            # The angle is a float32 product, as everywhere rotary embeddings are computed.
            angle = float(np.float32(position) * rotary.inverse[i].numpy())
            cos, sin = 1.25 * math.cos(angle), 1.25 * math.sin(angle)
            result[i] = head[i] * cos - head[i + half] * sin
            result[i + half] = head[i + half] * cos + head[i] * sin
        return result

    heads = exact(qkv).reshape(tokens, -1, head_dim)
    expected = np.array(
        [
            [
                rotated(heads[t, h], norms[h >= query_heads], int(batch.positions[t]))
                for h in range(query_heads + kv_heads)
            ]
            for t in range(tokens)
        ]
    )
    check(queries, expected[:, :query_heads], dtype, roundings=4)
    coarse = max(dtype, kv_dtype, key=lambda kind: STEP[kind])
    written = keys[:, batch.slots].transpose(0, 1)
    check(written.to(coarse), expected[:, query_heads:], coarse, roundings=6)
    assert torch.equal(
        values[:, batch.slots].transpose(0, 1), qkv.view(tokens, -1, head_dim)[:, -kv_heads:].to(kv_dtype)
    )
    others = torch.ones(slots, dtype=torch.bool)
    others[batch.slots] = False
    assert (keys[:, others] == 9).all()
    assert (values[:, others] == 9).all()


def naive_attention(
    batch: RaggedBatch, queries: Array, keys: Array, values: Array, scale: float, window: int | None
) -> Array:
    output = np.zeros_like(queries)
    group = queries.shape[1] // keys.shape[0]
    for s in range(batch.num_sequences):
        slots = batch.context_slots[batch.context_starts[s] : batch.context_starts[s + 1]].tolist()
        first, last = batch.query_starts[s], batch.query_starts[s + 1]
        for t in range(first, last):
            index = len(slots) - (last - t)
            seen = slots[max(0, index + 1 - (window or index + 1)) : index + 1]
            for h in range(queries.shape[1]):
                scores = [scale * sum(queries[t, h] * keys[h // group, slot]) for slot in seen]
                weights = np.exp(np.array(scores) - max(scores))
                rows = [values[h // group, slot] for slot in seen]
                output[t, h] = sum(w * row for w, row in zip(weights / weights.sum(), rows, strict=True))
    return output.reshape(len(queries), -1)


@settings(max_examples=150, deadline=None)
@given(DTYPES, st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 5, 8]), st.data())
def test_attention(dtype: torch.dtype, kv_heads: int, group: int, head_dim: int, data: st.DataObject) -> None:
    """Decodes and chunks mixed, whatever the bounds of blocks and groups; the pool is NaN where nothing was written."""
    sequences = data.draw(
        st.lists(st.tuples(st.sampled_from([1, 1, 2, 9]), st.integers(0, 20)), min_size=1, max_size=6)
    )
    window = data.draw(st.none() | st.integers(1, 24), "window")
    shared, seed = data.draw(st.sampled_from([0, 4]), "shared"), data.draw(SEEDS, "seed")
    kv_dtype = data.draw(st.sampled_from([dtype, torch.float32]), "kv dtype")
    batch = batch_of([new for new, _ in sequences], [old for _, old in sequences], 200, seed, shared)
    keys, values = (torch.full((kv_heads, 200, head_dim), torch.nan, dtype=kv_dtype) for _ in range(2))
    for i, pool in enumerate((keys, values)):
        rows = random(seed + i, kv_heads, len(batch.context_slots), head_dim, dtype=dtype)
        pool[:, batch.context_slots] = rows.to(kv_dtype)
    queries = random(seed + 2, batch.num_tokens, kv_heads * group, head_dim, dtype=dtype)
    scale = data.draw(st.sampled_from([0.3, 1.0]), "scale")
    bounds: dict[str, Any] = {
        "QUERY_BLOCK": data.draw(st.sampled_from([256, 3, 1]), "query block"),
        "DECODE_GROUP_KEYS": data.draw(st.sampled_from([2048, 30]), "group"),
        "SHORT_CONTEXT": data.draw(st.sampled_from([128, 2]), "short"),
    }
    with mock.patch.multiple(reference_attention, **bounds):
        frequencies = RotaryFrequencies(torch.ones(0), 1.0)
        step = OPS.begin_step(batch, (frequencies,), kv_heads, (window,))
        result = OPS.attention(queries, keys, values, scale, window, step)
    expected = naive_attention(batch, exact(queries), exact(keys), exact(values), scale, window)
    check(result, expected, dtype, roundings=4 if dtype == torch.float32 else 3)


def test_long_chunk_after_a_long_prefix() -> None:
    """More queries than a block and more keys than a group, at the real bounds."""
    batch = batch_of([300, 1, 1, 1, 1], [150, 1500, 900, 40, 0], 4000, seed=1)
    keys, values = (random(i, 1, 4000, 4, dtype=torch.float32) for i in range(2))
    queries = random(2, batch.num_tokens, 2, 4, dtype=torch.float32)
    step = OPS.begin_step(batch, (RotaryFrequencies(torch.ones(1), 1.0),), 1, (None, 200))
    for window in (None, 200):
        result = OPS.attention(queries, keys, values, 0.5, window, step)
        expected = naive_attention(batch, exact(queries), exact(keys), exact(values), 0.5, window)
        check(result, expected, torch.float32, roundings=6)


def test_pool_of_one_layer_is_a_view() -> None:
    """Layers of the cache are written through views: nothing of another layer changes."""
    cache = KvCache(torch.zeros(3, 1, 8, 4), torch.zeros(3, 1, 8, 4))
    batch = batch_of([2], [0], 8, seed=3)
    step = OPS.begin_step(batch, (RotaryFrequencies(torch.ones(2), 1.0),), 1, (None,))
    OPS.rotary_store(torch.ones(2, 12), None, None, EPS, cache.keys[1], cache.values[1], 0, step)
    assert cache.values.sum(dim=(1, 2, 3)).tolist() == [0, 8, 0]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"query_starts": (0, 2, 4)}, "query_starts"),
        ({"query_starts": (0, 0, 3)}, "sequence 0 has 0 new tokens"),
        ({"context_lengths": (2, 9)}, "context_starts"),
        ({"slots": torch.zeros(2, dtype=torch.int64)}, "slots"),
        ({"context_slots": torch.zeros(2, dtype=torch.int64)}, "context_slots"),
        ({"context_lengths": (1, 8), "context_starts": (0, 1, 9)}, "sequence 0 has 2 new tokens"),
    ],
)
def test_batches_that_disagree_with_themselves_are_refused(changes: dict[str, object], named: str) -> None:
    good = {
        "token_ids": torch.zeros(3, dtype=torch.int64),
        "positions": torch.zeros(3, dtype=torch.int64),
        "slots": torch.arange(3),
        "query_starts": (0, 2, 3),
        "context_lengths": (4, 5),
        "context_slots": torch.arange(9),
        "context_starts": (0, 4, 9),
    }
    RaggedBatch(**good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=named):
        RaggedBatch(**{**good, **changes})  # type: ignore[arg-type]
