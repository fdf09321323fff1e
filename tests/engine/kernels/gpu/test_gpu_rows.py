"""Kernels of rows against the reference: norms, embeddings, activations, pooling, rotation."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pytest
import torch
from ragged import BF16, F16, F32, batch_of, bits, check, moved, random

from engine.kernels import reference
from engine.kernels.dense import DenseMatrix
from engine.kernels.gpu.ops import GpuOps
from engine.kernels.gpu.rows import add_up_call
from engine.kernels.table import Activation, Pooling, RotaryFrequencies
from engine.parallel.group import in_order

EPS = 1e-5
EACH_DTYPE = pytest.mark.parametrize("dtype", [F32, BF16, F16])
ACTIVATIONS = typing.get_args(Activation)


@pytest.fixture(scope="module")
def ops(device: torch.device) -> GpuOps:
    return GpuOps(device)


def there(ops: GpuOps, *tensors: torch.Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.to(ops.device) for tensor in tensors]


def dense(weight: torch.Tensor, bias: torch.Tensor | None, device: torch.device, *, wide: bool = False) -> DenseMatrix:
    """wide: in float64, for the oracle."""
    parts = [None if part is None else part.double() if wide else part.to(device) for part in (weight, bias)]
    assert parts[0] is not None
    return DenseMatrix(parts[0], parts[1])


@pytest.mark.parametrize("width", [1, 72, 128, 1030])
@pytest.mark.parametrize("carried", [False, True])
@EACH_DTYPE
def test_rms_norm(ops: GpuOps, dtype: torch.dtype, carried: bool, width: int) -> None:
    x, weight = random(1, 3, width, dtype=dtype), random(2, width, dtype=F32 if width == 72 else dtype)
    residual = random(3, 3, width, dtype=dtype) if carried else None
    normed, total = ops.rms_norm(*there(ops, x, residual, weight), EPS)
    assert normed.dtype == total.dtype == dtype
    check(total, reference.rms_norm(x, residual, weight, EPS)[1], dtype, 1)
    check(normed, reference.rms_norm(total.cpu().double(), None, weight.double(), EPS)[0], dtype)


@pytest.mark.parametrize("width", [2, 48, 1024])
@pytest.mark.parametrize("carried", [False, True])
@EACH_DTYPE
def test_layer_norm(ops: GpuOps, dtype: torch.dtype, carried: bool, width: int) -> None:
    x, weight, bias = random(1, 3, width, dtype=dtype), random(2, width, dtype=dtype), random(4, width, dtype=dtype)
    residual = random(3, 3, width, dtype=dtype) if carried else None
    total = x if residual is None else x + residual
    found = ops.layer_norm(*there(ops, x, residual, weight, bias), EPS)
    check(found, reference.layer_norm(total.double(), None, weight.double(), bias.double(), EPS), dtype)


@pytest.mark.parametrize("width", [1, 40, 1500])
@EACH_DTYPE
def test_embeddings(ops: GpuOps, dtype: torch.dtype, width: int) -> None:
    tokens, positions, types = (random(i, 30, width, dtype=dtype) for i in range(3))
    batch = batch_of([3, 2], [5, 0], 20)
    found = ops.embedding(batch.token_ids.to(ops.device), dense(tokens, None, ops.device), 3.5)
    assert torch.equal(found.cpu(), reference.embedding(batch.token_ids, DenseMatrix(tokens, None), 3.5))
    for type_ids, kinds in ((None, types), (torch.tensor([1, 0, 1, 0, 1]), types), (None, None)):
        batch = dataclasses.replace(batch, type_ids=type_ids)
        matrices = [None if part is None else dense(part, None, ops.device) for part in (tokens, positions, kinds)]
        wide = [None if part is None else DenseMatrix(part.double(), None) for part in (tokens, positions, kinds)]
        found = ops.embedding_sum(moved(batch, ops.device), *matrices, 2)
        check(found, reference.embedding_sum(batch, *wide, 2), dtype)


@EACH_DTYPE
def test_embeddings_of_a_part(ops: GpuOps, dtype: torch.dtype) -> None:
    """Rows 8 to 19 of a vocabulary: zeros for all other tokens, whose rows must not be read."""
    batch = dataclasses.replace(batch_of([3, 2], [5, 0], 20), token_ids=torch.tensor([7, 8, 19, 20, 30]))
    tokens, types = random(1, 12, 40, dtype=dtype), random(2, 2, 40, dtype=dtype)
    found = ops.embedding(batch.token_ids.to(ops.device), dense(tokens, None, ops.device), 2.0, 8)
    assert torch.equal(found.cpu(), reference.embedding(batch.token_ids, DenseMatrix(tokens, None), 2.0, 8))
    assert found.cpu().any(1).tolist() == [False, True, True, False, False]
    for kinds in (None, types):
        matrices = [None if part is None else dense(part, None, ops.device) for part in (tokens, None, kinds)]
        wide = [None if part is None else DenseMatrix(part.double(), None) for part in (tokens, None, kinds)]
        found = ops.embedding_sum(moved(batch, ops.device), *matrices, 2, 8)
        check(found, reference.embedding_sum(batch, *wide, 2, 8), dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biased", [False, True])
@EACH_DTYPE
def test_linear(ops: GpuOps, dtype: torch.dtype, biased: bool, activation: Activation) -> None:
    x, weight = random(1, 5, 24, dtype=dtype), random(2, 14, 24, dtype=dtype) * 0.3
    bias = random(3, 14, dtype=dtype) if biased else None
    found = ops.linear(x.to(ops.device), dense(weight, bias, ops.device), activation)
    assert found.dtype == dtype
    check(found, reference.linear(x.double(), dense(weight, bias, ops.device, wide=True), activation), dtype, 6)
    found = ops.gated_linear(x.to(ops.device), dense(weight, bias, ops.device), activation)
    check(found, reference.gated_linear(x.double(), dense(weight, bias, ops.device, wide=True), activation), dtype, 12)


@pytest.mark.parametrize("biased", [False, True])
@EACH_DTYPE
def test_logits_are_float32(ops: GpuOps, dtype: torch.dtype, biased: bool) -> None:
    x, weight = random(1, 70, 24, dtype=dtype), random(2, 90, 24, dtype=dtype)
    bias = random(3, 90, dtype=dtype) if biased else None
    found = ops.logits(x.to(ops.device), dense(weight, bias, ops.device))
    assert found.dtype == F32
    check(found, reference.linear(x.double(), dense(weight, bias, ops.device, wide=True)), F32, 20)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_row_of_a_product_does_not_know_the_others(ops: GpuOps, dtype: torch.dtype) -> None:
    x, weight = random(1, 300, 64, dtype=dtype), dense(random(2, 48, 64, dtype=dtype), None, ops.device)
    whole, head = ops.linear(x.to(ops.device), weight), ops.logits(x.to(ops.device), weight)
    for rows in ([0], [299], [5, 130, 7], list(range(127, 260))):
        some = x[rows].to(ops.device)
        assert bits(ops.linear(some, weight)) == bits(whole[rows])
        assert bits(ops.logits(some, weight)) == bits(head[rows])
        assert bits(ops.linear(x.to(ops.device)[: max(rows) + 1], weight)[rows]) == bits(whole[rows])


@pytest.mark.parametrize(("ranks", "tokens", "width"), [(2, 1, 1), (3, 5, 40), (8, 130, 72)])
@EACH_DTYPE
def test_sums_over_ranks_are_in_order(
    device: torch.device, dtype: torch.dtype, ranks: int, tokens: int, width: int
) -> None:
    """To the bit, and nothing is written behind them."""
    parts = random(4, ranks, tokens, width, dtype=dtype)
    room = torch.full((tokens * width + 9,), 7.0, dtype=dtype, device=device)
    add_up_call(parts.to(device), room[: tokens * width].view(tokens, width)).run()
    assert bits(room[: tokens * width].view(tokens, width)) == bits(in_order(list(parts)))
    assert (room[tokens * width :] == 7).all()


@pytest.mark.parametrize("pooling", typing.get_args(Pooling))
@EACH_DTYPE
def test_pooling(ops: GpuOps, dtype: torch.dtype, pooling: Pooling) -> None:
    batch, hidden = batch_of([3, 1, 9], [0, 0, 0], 20), random(1, 13, 40, dtype=dtype)
    rows = torch.tensor([12, 2, 3])
    found = ops.pool(hidden.to(ops.device), batch, rows.numpy(), pooling)
    assert found.dtype == dtype
    check(found, reference.pool(hidden, batch, rows, pooling).double(), dtype, 1)


@pytest.mark.parametrize(
    ("dim", "rotary_dim", "query_heads", "kv_heads", "normed"),
    [(64, 64, 3, 1, False), (80, 32, 2, 2, False), (12, 12, 6, 2, True), (18, 10, 7, 1, True), (16, 0, 2, 2, False)],
)
@EACH_DTYPE
def test_rotary_store(
    ops: GpuOps, dtype: torch.dtype, dim: int, rotary_dim: int, query_heads: int, kv_heads: int, normed: bool
) -> None:
    batch, slots = batch_of([3, 1], [1000, 0], 1010), 1010
    steps = torch.arange(rotary_dim // 2) / max(1, rotary_dim // 2)
    rotaries = tuple(RotaryFrequencies(base**-steps, 1.25) for base in (50.0, 1e4))
    norms = [random(4 + i, dim, dtype=F32 if dim == 18 else dtype) if normed else None for i in range(2)]
    qkv = random(1, 4, (query_heads + 2 * kv_heads) * dim, dtype=dtype)
    results = []
    for implementation, device in ((ops, ops.device), (reference, torch.device("cpu"))):
        keys, values = (torch.full((2, kv_heads, slots, dim), 9.0, dtype=dtype, device=device) for _ in range(2))
        step = implementation.begin_step(moved(batch, device), rotaries, kv_heads, (None,))
        q_norm, k_norm = (None if norm is None else norm.to(device) for norm in norms)
        queries = implementation.rotary_store(
            qkv.to(device), q_norm, k_norm, EPS, keys[1], values[1], 1 if rotary_dim else None, step
        )
        results.append((queries, keys, values))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == dtype
        check(found, expected.double(), dtype, 3)
    assert torch.equal(results[0][2].cpu(), results[1][2])
