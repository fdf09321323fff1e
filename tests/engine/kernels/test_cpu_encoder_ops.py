"""The ops of encoders on each ISA against the reference ops in float64: functions of products, layer norms, sums of
embeddings, norms of branches, pooling. Attention is elsewhere."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from backends import ISAS
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import (
    BF16,
    BFLOAT16_STEP,
    F16,
    F32,
    FLOAT32_STEP,
    KINDS,
    batch_of,
    buffer,
    check_close,
    dense,
    exact_linear,
    kind_id,
    narrow_of,
    packed,
    padded_vector,
    product,
    random,
    read,
    run,
    sum_error,
    team,
)

from engine.kernels import _cpu, reference
from engine.kernels.batch import RaggedBatch, offsets
from engine.kernels.table import Activation, Pooling

EPS = 1e-5
SEEDS = st.integers(0, 2**32 - 1)
ROWS = st.one_of(st.integers(1, 20), st.integers(21, 130))
SIZES = st.one_of(st.integers(1, 40), st.integers(41, 200))
FUNCTIONS = get_args(Activation)
kinds = pytest.mark.parametrize(("isa", "dtype"), KINDS, ids=kind_id)
isas = pytest.mark.parametrize("isa", ISAS)
functions = pytest.mark.parametrize("activation", FUNCTIONS)
modest = settings(max_examples=20, deadline=None)


def exactly(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    return reference.activate(x.double(), activation)


@isas
@functions
def test_functions(isa: str, activation: Activation) -> None:
    """Close to float32's own precision over all that a product may give; and what is not finite stays so."""
    x = torch.cat((torch.linspace(-12, 12, 48_001), torch.logspace(-30, 4, 3000), -torch.logspace(-30, 4, 3000)))
    one = packed(torch.ones(1, 1))
    found = product(isa, x[:, None], one, activation=activation)[:, 0]
    expected = exactly(x, activation)
    # gelu by erf loses digits where 1 + erf is small; an exponential's are off by the roundings of its exponent.
    absolute = 2.5e-7 * x.abs() * (x.abs() > 1) if activation == "gelu" else 1e-13 * x.abs()
    check_close(found, expected, absolute + 12 * FLOAT32_STEP * expected.abs() * (1 + x.abs().clamp(max=12)) + 1e-36)
    assert torch.isnan(product(isa, torch.full((1, 1), torch.nan), one, activation=activation)).all()
    assert product(isa, torch.zeros(1, 1), one, activation=activation).item() == 0


@kinds
@functions
@modest
@given(rows=ROWS, inputs=SIZES, outputs=SIZES, biased=st.booleans(), narrow=st.booleans(), seed=SEEDS)
def test_products_and_functions_of_them(
    isa: str, dtype: torch.dtype, activation: Activation, rows: int, inputs: int, outputs: int, biased: bool,
    narrow: bool, seed: int,
) -> None:  # fmt: skip
    out = BF16 if narrow else F32
    x, weight = random(seed, rows, inputs, dtype=narrow_of(dtype)), random(seed + 1, outputs, inputs, dtype=dtype)
    bias = random(seed + 2, outputs) if biased else None
    matrix = packed(weight, bias)
    found = product(isa, x, matrix, out=out, activation=activation)
    exact = exact_linear(x, weight, bias)
    expected = exactly(exact, activation)
    # No slope here is above 1.2.
    allowed = 1.2 * sum_error(x, weight, bias) + 5e-7 * exact.abs() + 1e-30
    check_close(found, expected, allowed + (1.01 * BFLOAT16_STEP * expected.abs() if narrow else 0))
    row = seed % rows
    alone = product(isa, x[row : row + 1], matrix, out=out, activation=activation, threads=1)
    assert torch.equal(alone, found[row : row + 1])


@kinds
@functions
def test_gates(isa: str, dtype: torch.dtype, activation: Activation) -> None:
    x, weight = random(1, 37, 45, dtype=narrow_of(dtype)), random(2, 2 * 50, 45, dtype=dtype)
    bias = random(3, 100)
    found = product(isa, x, packed(weight, bias, gated=True), "gate", activation=activation)
    gate, up = exact_linear(x, weight, bias).chunk(2, dim=1)
    off_gate, off_up = sum_error(x, weight, bias).chunk(2, dim=1)
    allowed = (1.2 * off_gate + 5e-7 * gate.abs()) * (up.abs() + off_up) + off_up * gate.abs() + 1e-30
    check_close(found, exactly(gate, activation) * up, allowed)


def layer_norm(
    isa: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, narrow: torch.dtype | None, *, inplace: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    plan = _cpu.Plan(team(isa), isa)
    width = x.shape[1]
    source = buffer(plan, width, F32, x)
    target = source if inplace else buffer(plan, width)
    narrowed = None if narrow is None else buffer(plan, width, narrow)
    vectors = padded_vector(weight), padded_vector(bias)
    plan.layer_norm(source, *(vector.data_ptr() for vector in vectors), EPS, target, narrowed)
    run(plan, len(x))
    return read(plan, target, len(x)), None if narrowed is None else read(plan, narrowed, len(x))


@isas
@modest
@given(
    rows=ROWS, width=st.one_of(st.integers(1, 200), st.integers(201, 5000)), mean=st.sampled_from([0.0, 1.0, -30.0]),
    inplace=st.booleans(), seed=SEEDS,
)  # fmt: skip
def test_layer_norms(isa: str, rows: int, width: int, mean: float, inplace: bool, seed: int) -> None:
    x, weight, bias = random(seed, min(rows, 40), width) * 3 + mean, random(seed + 1, width), random(seed + 2, width)
    expected = reference.layer_norm(x.double(), None, weight.double(), bias.double(), EPS)
    # The mean is off by some roundings of itself, in units of the deviation.
    deviation = (x.double().var(dim=1, correction=0, keepdim=True) + EPS).sqrt()
    off = 4 * FLOAT32_STEP * (x.double().abs().amax(dim=1, keepdim=True) + deviation) / deviation
    allowed = off * weight.abs() + 4e-6 * FLOAT32_STEP + 8 * FLOAT32_STEP * (expected.abs() + bias.abs())
    # Where the row is nearly constant, the variance itself is a matter of those roundings.
    allowed = allowed * (1 + (expected - bias).abs() / weight.abs().clamp(min=1e-9) * off.clamp(min=1))
    wide, _ = layer_norm(isa, x, weight, bias, None, inplace=inplace)
    check_close(wide, expected, allowed)
    for dtype in (BF16, F16):
        again, narrowed = layer_norm(isa, x, weight, bias, dtype, inplace=inplace)
        assert narrowed is not None
        assert torch.equal(again, wide) and torch.equal(narrowed, wide.to(dtype).float())
    row = seed % len(x)
    assert torch.equal(layer_norm(isa, x[row : row + 1], weight, bias, None, inplace=inplace)[0], wide[row : row + 1])


@isas
def test_padding_does_not_count_and_ends_up_zero(isa: str) -> None:
    """Whatever stands behind a row: it is no part of the mean, and products that read on find zeros."""
    x, ones = random(1, 3, 32), torch.ones(64)
    plan = _cpu.Plan(team(isa), isa)
    # A product into a panel of 32 whose weights are one larger than the buffer is wide leaves numbers behind its rows.
    stream, source, narrowed = buffer(plan, 20), buffer(plan, 32, F32, x), buffer(plan, 20, BF16)
    weight, bias = random(2, 20, 32), random(3, 20)
    matrix, square = packed(weight, bias), packed(random(4, 20, 20))
    plan.linear(source, matrix.packed, stream, "store", False, "gelu")
    plan.layer_norm(stream, ones.data_ptr(), ones.data_ptr(), EPS, stream, narrowed)
    out = buffer(plan, 20)
    plan.linear(stream, square.packed, out, "store", False)
    run(plan, 3)
    exact = exactly(exact_linear(x, weight, bias), "gelu")
    normed = reference.layer_norm(exact, None, torch.ones(20).double(), torch.ones(20).double(), EPS)
    check_close(read(plan, stream, 3), normed, 2e-6 * normed.abs().max())
    # NaN in one step's rows is gone in the next.
    plan.write(source, np.full((3, 32), np.nan, np.float32))
    run(plan, 3)
    assert torch.isnan(read(plan, out, 3)).all()
    plan.write(source, x.numpy())
    run(plan, 3)
    check_close(read(plan, stream, 3), normed, 2e-6 * normed.abs().max())


@isas
@modest
@given(rows=ROWS, width=SIZES, seed=SEEDS)
def test_norms_of_branches(isa: str, rows: int, width: int, seed: int) -> None:
    branch, residual, weight = random(seed, rows, width) * 3, random(seed + 1, rows, width), random(seed + 2, width)
    plan = _cpu.Plan(team(isa), isa)
    source, target, vector = buffer(plan, width, F32, branch), buffer(plan, width, F32, residual), padded_vector(weight)
    plan.add_norm(source, vector.data_ptr(), EPS, target)
    run(plan, rows)
    normed = reference.rms_norm(branch.double(), None, weight.double(), EPS)[0]
    check_close(read(plan, target, rows), residual + normed, 1e-6 * normed.abs() + 1e-7 * (residual + normed).abs())


@isas
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=kind_id)
@modest
@given(rows=ROWS, width=SIZES, first=st.integers(0, 3), typed=st.sampled_from([None, False, True]), seed=SEEDS)
def test_sums_of_embeddings(
    isa: str, dtype: torch.dtype, rows: int, width: int, first: int, typed: bool | None, seed: int
) -> None:
    """typed: whether the step tells types apart; None: the model does not."""
    weights = [random(seed + i, size, width, dtype=dtype) for i, size in enumerate((40, 50, 3))]
    generator = torch.Generator().manual_seed(seed)
    ids, positions, types = (torch.randint(size, (rows,), generator=generator) for size in (40, 50 - first, 3))
    tables = [packed(weight) for weight in weights]
    plan = _cpu.Plan(team(isa), isa)
    out = buffer(plan, width)
    plan.embedding_sum(*(t.packed for t in tables[:2]), None if typed is None else tables[2].packed, first, out)
    starts = np.array([0, rows])
    plan.run(
        ids.numpy(), positions.numpy(), ids.numpy(), starts, starts, ids.numpy(), np.empty(0, np.int64),
        types.numpy() if typed else None,
    )  # fmt: skip
    batch = RaggedBatch(ids, positions, ids, (0, rows), (rows,), ids, offsets((rows,)), types if typed else None)
    expected = reference.embedding_sum(
        batch, dense(weights[0]), dense(weights[1]), None if typed is None else dense(weights[2]), first
    )
    found = read(plan, out, rows)
    check_close(found, expected, 2 * FLOAT32_STEP * sum(float(weight.abs().max()) for weight in weights))


@isas
@pytest.mark.parametrize("dtype", [F32, BF16], ids=kind_id)
def test_scaled_embeddings(isa: str, dtype: torch.dtype) -> None:
    weight, ids = random(1, 9, 45, dtype=dtype), torch.tensor([3, 8, 0])
    plan = _cpu.Plan(team(isa), isa)
    out, table = buffer(plan, 45), packed(weight)
    plan.embedding(table.packed, out, 45**0.5)
    run(plan, 3, token_ids=ids)
    assert torch.equal(read(plan, out, 3), weight[ids].float() * torch.tensor(45**0.5, dtype=F32))


LENGTHS = st.lists(st.one_of(st.integers(1, 9), st.integers(60, 200)), min_size=1, max_size=6)


def pooled(isa: str, pooling: Pooling, x: torch.Tensor, lengths: Any, rows: Any, threads: int = 2) -> torch.Tensor:
    plan = _cpu.Plan(team(isa, threads), isa)
    source = buffer(plan, x.shape[1], F32, x)
    plan.begin_head(pooling)
    out = buffer(plan, x.shape[1])
    plan.pool(source, out)
    starts, ids = np.array(offsets(tuple(lengths))), np.zeros(len(x), np.int64)
    plan.run(ids, ids, ids, starts, starts, ids, np.array(rows, np.int64))
    return read(plan, out, len(rows))


@isas
@pytest.mark.parametrize("pooling", get_args(Pooling))
@modest
@given(lengths=LENGTHS, width=st.one_of(SIZES, st.integers(201, 700)), seed=SEEDS, data=st.data())
def test_pooling(isa: str, pooling: Pooling, lengths: list[int], width: int, seed: int, data: Any) -> None:
    x = random(seed, sum(lengths), width) + 1
    batch = batch_of([(length, range(length)) for length in lengths])
    chosen = data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, max_size=40), "sequences")
    rows = [batch.query_starts[i + 1] - 1 for i in chosen]
    found = pooled(isa, pooling, x, lengths, rows)
    expected = reference.pool(x.double(), batch, torch.tensor(rows), pooling)
    assert found.shape == expected.shape
    if pooling == "mean":
        exact = torch.stack([x[batch.query_starts[i] : batch.query_starts[i + 1]].double().mean(dim=0) for i in chosen])
        check_close(found, exact, 16 * FLOAT32_STEP * float(x.abs().max()))
    else:
        assert torch.equal(found, expected.float())
    i = chosen[0]
    alone = x[batch.query_starts[i] : batch.query_starts[i + 1]]
    assert torch.equal(pooled(isa, pooling, alone, lengths[i : i + 1], [len(alone) - 1], 1), found[:1])


@isas
def test_pooling_of_what_is_not_finite(isa: str) -> None:
    x = random(1, 6, 40)
    x[4, 7], x[1, 3], x[0, 2] = torch.nan, torch.nan, -torch.inf
    largest = pooled(isa, "max", x, [3, 3], [2, 5])
    assert torch.equal(largest.nan_to_num(99), torch.stack([x[:3].amax(0), x[3:].amax(0)]).nan_to_num(99))
    assert torch.isnan(pooled(isa, "mean", x, [3, 3], [2, 5])).sum() == 2
