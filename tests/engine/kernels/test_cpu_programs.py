"""Whole programs of the cpu backend against the reference's in float64: an encoder that norms behind each part, a
decoder that norms its branches too, heads of every kind; bit for bit in any company, on any number of threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from backends import backend
from plans import BF16, BFLOAT16_STEP, F16, F32, KINDS, check_close, kind_id, random

from engine.kernels.batch import RaggedBatch, offsets
from engine.kernels.kv_cache import KvCache
from engine.kernels.table import Activation, Backend, Ops, Pooling, Program, RotaryFrequencies

WIDTH, VOCABULARY, POSITIONS, FIRST_POSITION, LAYERS = 44, 50, 60, 2, 2
EPS = 1e-5
POOLINGS: list[Pooling] = ["row", "first", "mean", "max"]
LENGTHS = (5, 1, 12, 33, 2)
kinds = pytest.mark.parametrize(("isa", "dtype"), KINDS, ids=kind_id)


@dataclass
class Weights:
    """The same weights for whatever backend: rounded to `dtype`, then held in `held`."""

    backend: Backend
    dtype: torch.dtype
    held: torch.dtype
    seed: int = 0

    def matrix(self, outputs: int, inputs: int, *, bias: bool = False, gated: bool = False) -> Any:
        self.seed += 2
        matrix = self.backend.matrix(outputs, inputs, self.held, bias=bias, gated=gated)
        matrix.rows(0, outputs).write(0, (random(self.seed, outputs, inputs) * inputs**-0.5).to(self.dtype))
        if bias:
            matrix.bias(0, outputs).write(0, random(self.seed + 1, outputs).to(self.dtype) / 4)
        return matrix

    def vector(self, size: int) -> torch.Tensor:
        self.seed += 1
        made = self.backend.vector(size, self.held)
        made[:size] = 1 + random(self.seed, size).to(self.dtype) / 4
        return made


Step = Callable[[Ops, RaggedBatch, KvCache], Any]
Head = Callable[[Ops, Any], Any]


def encoder(weights: Weights, activation: Activation = "gelu", typed: bool = True) -> tuple[Step, tuple[int, int]]:
    """The step of an encoder as BERT's, and (heads, head size)."""
    heads, head_dim, inner = 3, 20, 70
    tables = [weights.matrix(rows, WIDTH) for rows in (VOCABULARY, POSITIONS + FIRST_POSITION)]
    types = weights.matrix(2, WIDTH) if typed else None
    norms = [weights.vector(WIDTH) for _ in range(2)]
    layers = [
        (
            weights.matrix(3 * heads * head_dim, WIDTH, bias=True), weights.matrix(WIDTH, heads * head_dim, bias=True),
            weights.matrix(inner, WIDTH, bias=True), weights.matrix(WIDTH, inner, bias=True),
            [weights.vector(WIDTH) for _ in range(4)],
        )
        for _ in range(LAYERS)
    ]  # fmt: skip

    def step(ops: Ops, batch: RaggedBatch, cache: KvCache) -> Any:
        context = ops.begin_step(batch, (), heads, (None,), causal=False)
        x: Any = ops.embedding_sum(batch, *tables, types, FIRST_POSITION)
        x = ops.layer_norm(x, None, *norms, EPS)
        for number, (qkv, output, up, down, scales) in enumerate(layers):
            pool = cache.keys[number], cache.values[number]
            queries = ops.rotary_store(ops.linear(x, qkv), None, None, EPS, *pool, None, context)
            attended = ops.attention(queries, *pool, head_dim**-0.5, None, context)
            x = ops.layer_norm(ops.linear(attended, output), x, scales[0], scales[1], EPS)
            x = ops.layer_norm(ops.linear(ops.linear(x, up, activation), down), x, scales[2], scales[3], EPS)
        return x

    return step, (heads, head_dim)


def decoder(weights: Weights, causal: bool = True) -> tuple[Step, tuple[int, int]]:
    """The step of a decoder as Gemma 3's, and (key heads, head size)."""
    heads, kv_heads, head_dim, inner = 4, 2, 24, 72
    window = 3 if causal else None
    table = weights.matrix(VOCABULARY, WIDTH)
    rotaries = (
        RotaryFrequencies(10000.0 ** -(torch.arange(12) / 12), 1.0),
        RotaryFrequencies(100.0 ** -(torch.arange(8) / 8), 1.25),
    )
    final = weights.vector(WIDTH)
    layers = [
        (
            weights.matrix((heads + 2 * kv_heads) * head_dim, WIDTH), weights.matrix(WIDTH, heads * head_dim),
            weights.matrix(2 * inner, WIDTH, gated=True), weights.matrix(WIDTH, inner),
            [weights.vector(WIDTH) for _ in range(4)], [weights.vector(head_dim) for _ in range(2)],
        )
        for _ in range(LAYERS)
    ]  # fmt: skip

    def step(ops: Ops, batch: RaggedBatch, cache: KvCache) -> Any:
        context = ops.begin_step(batch, rotaries, kv_heads, (None, window), causal=causal)
        x: Any = ops.embedding(batch.token_ids, table, 1.5)
        residual: Any = None
        for number, (qkv, output, gate_up, down, scales, (q_norm, k_norm)) in enumerate(layers):
            pool = cache.keys[number], cache.values[number]
            x, residual = ops.rms_norm(x, residual, scales[0], EPS)
            queries = ops.rotary_store(ops.linear(x, qkv), q_norm, k_norm, EPS, *pool, number, context)
            attended = ops.attention(queries, *pool, head_dim**-0.5, (None, window)[number], context)
            x = ops.rms_norm(ops.linear(attended, output), None, scales[1], EPS)[0]
            x, residual = ops.rms_norm(x, residual, scales[2], EPS)
            product = ops.linear(ops.gated_linear(x, gate_up, "gelu_tanh"), down)
            x = ops.rms_norm(product, None, scales[3], EPS)[0]
        return ops.rms_norm(x, residual, final, EPS)[0]

    return step, (kv_heads, head_dim)


def heads_of(weights: Weights) -> dict[str, Head]:
    dense, wider = weights.matrix(WIDTH, WIDTH, bias=True), weights.matrix(70, WIDTH)
    again, labels = weights.matrix(70, 70, bias=True), weights.matrix(3, WIDTH, bias=True)
    return {
        "vectors": lambda ops, rows: ops.vectors(rows),
        "projected": lambda ops, rows: ops.vectors(ops.linear(ops.linear(rows, wider), again, "tanh")),
        "classifier": lambda ops, rows: ops.logits(ops.linear(rows, dense, "tanh"), labels),
        "labels": lambda ops, rows: ops.logits(rows, labels),
    }


Body = Callable[[Weights], tuple[Step, tuple[int, int]]]


def program(
    body: Body, head: str, pooling: Pooling, where: Backend, dtype: torch.dtype, *, exact: bool = False
) -> Program:
    weights = Weights(where, dtype, torch.float64 if exact else dtype)
    step, (kv_heads, head_dim) = body(weights)
    pools = [torch.zeros(1, kv_heads, 80, head_dim, dtype=weights.held).expand(LAYERS, -1, -1, -1) for _ in range(2)]
    return where.compile(step, heads_of(weights)[head], KvCache(*pools), dtype, pooling)


def batch_of(lengths: tuple[int, ...], chosen: tuple[int, ...] | None = None) -> RaggedBatch:
    """Sequences that lie wholly in the step: all, or those chosen, with the same ids."""
    chosen = tuple(range(len(lengths))) if chosen is None else chosen
    lengths = tuple(lengths[i] for i in chosen)
    ids, types = [], []
    for i, length in zip(chosen, lengths, strict=True):
        generator = torch.Generator().manual_seed(i)
        ids.append(torch.randint(VOCABULARY, (length,), generator=generator))
        types.append(torch.randint(2, (length,), generator=generator))
    starts, slots = offsets(lengths), torch.arange(sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])
    return RaggedBatch(torch.cat(ids), positions, slots, starts, lengths, slots, starts, torch.cat(types))


def last_rows(batch: RaggedBatch) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(batch.query_starts[1:], np.int64) - 1


def check(body: Body, head: str, pooling: Pooling, isa: str, dtype: torch.dtype) -> None:
    exact = program(body, head, pooling, backend("reference"), dtype, exact=True)
    batch = batch_of(LENGTHS)
    rows = last_rows(batch)
    expected = exact.run(batch, rows).clone()
    found_by = program(body, head, pooling, backend(isa), dtype)
    found = found_by.run(batch, rows).clone()
    # Products of narrow inputs each round them; float32 sums wander.
    step = {F32: 4e-6, F16: 4 * 2.0**-11, BF16: 7 * BFLOAT16_STEP}[dtype]
    check_close(found, expected, step * float(expected.abs().max()))
    pooled, given = found_by.pooled().clone(), exact.pooled()
    assert pooled.dtype == F32
    check_close(pooled, given, step * float(given.abs().max()))
    if dtype == BF16:
        typical = (found - expected).abs().mean() / expected.abs().mean()
        assert typical < BFLOAT16_STEP * 2

    again = rows[[2, 0, 2]]
    assert torch.equal(found_by.logits(again), found[[2, 0, 2]])
    assert torch.equal(found_by.pooled(), pooled[[2, 0, 2]])
    for threads, chosen in ((1, (3,)), (3, (4, 2, 1))):
        other = program(body, head, pooling, backend(isa, threads), dtype)
        company = batch_of(LENGTHS, chosen)
        assert torch.equal(other.run(company, last_rows(company)), found[list(chosen)])
        assert torch.equal(other.pooled(), pooled[list(chosen)])


@kinds
@pytest.mark.parametrize("pooling", POOLINGS)
def test_an_encoder(isa: str, dtype: torch.dtype, pooling: Pooling) -> None:
    for head in ("vectors", "classifier"):
        check(encoder, head, pooling, isa, dtype)


@kinds
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_decoder(isa: str, dtype: torch.dtype, pooling: Pooling) -> None:
    for head in ("vectors", "labels"):
        check(decoder, head, pooling, isa, dtype)


@kinds
def test_heads_and_variants(isa: str, dtype: torch.dtype) -> None:
    check(lambda weights: encoder(weights, "relu", typed=False), "projected", "mean", isa, dtype)
    check(lambda weights: decoder(weights, causal=False), "projected", "row", isa, dtype)


def test_rows_of_a_decoder_that_generates() -> None:
    """Without pooling any rows may be asked for, in any order, of sequences in pieces."""
    made = program(decoder, "labels", "row", backend(KINDS[0][0]), F32)
    batch = batch_of(LENGTHS)
    every = made.run(batch, np.arange(batch.num_tokens)).clone()
    assert torch.equal(made.logits(np.array([7, 0, 7])), every[[7, 0, 7]])
    assert made.run(batch, np.empty(0, np.int64)).shape == (0, 3)


@pytest.mark.parametrize("pooling", POOLINGS[1:])
def test_pooling_of_pieces_is_refused(pooling: Pooling) -> None:
    made = program(encoder, "vectors", pooling, backend(KINDS[0][0]), F32)
    batch = batch_of((4, 6))
    made.run(batch, np.array([9, 3]))
    for bad in ([2], [3, 8], [0]):
        with pytest.raises(ValueError, match=f"picked row {bad[-1]} is not the last of a sequence that lies wholly"):
            made.run(batch, np.array(bad))
        with pytest.raises(ValueError, match="wholly"):
            made.logits(np.array(bad))
    cached = RaggedBatch(
        batch.token_ids[:7], batch.positions[:7], batch.slots[:7], (0, 1, 7), (4, 6), batch.context_slots, (0, 4, 10)
    )
    made.run(cached, np.array([6]))
    with pytest.raises(ValueError, match="picked row 0 is not the last"):
        made.run(cached, np.array([0]))


def test_indices_beyond_their_tables_are_refused() -> None:
    made = program(encoder, "vectors", "mean", backend(KINDS[0][0]), F32)

    def run(ids: int = 0, position: int = 0, kind: int | None = 0) -> None:
        one = torch.zeros(1, dtype=torch.int64)
        types = None if kind is None else one + kind
        made.run(RaggedBatch(one + ids, one + position, one, (0, 1), (1,), one, (0, 1), types), np.array([0]))

    run(VOCABULARY - 1, POSITIONS - 1, 1)
    run(kind=None)
    for wrong, said in [
        ({"ids": VOCABULARY}, r"token id 50 is not in \[0, 50\)"), ({"position": POSITIONS}, r"position 60 is not in"),
        ({"position": -1}, "position -1"), ({"kind": 2}, r"type id 2 is not in \[0, 2\)"), ({"kind": -1}, "type id -1"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            run(**wrong)
