"""Each op of the cpu backend on each ISA against the reference ops in float64, attention excepted."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from backends import BFLOAT16_ISAS, ISAS
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
    norm,
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
from engine.kernels.packed import DTYPES, packed_matrix
from engine.kernels.record import PANEL
from engine.kernels.table import RotaryFrequencies

EPS = 1e-5
SEEDS = st.integers(0, 2**32 - 1)
ROWS = st.one_of(st.integers(1, 20), st.integers(21, 130))
SIZES = st.one_of(st.integers(1, 40), st.integers(41, 200))
DTYPE_LIST = [F32, BF16, F16]
kinds = pytest.mark.parametrize(("isa", "dtype"), KINDS, ids=kind_id)
isas = pytest.mark.parametrize("isa", ISAS)
modest = settings(max_examples=25, deadline=None)


def check_product(isa: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int, biased: bool, seed: int) -> None:
    x, weight = random(seed, rows, inputs, dtype=narrow_of(dtype)), random(seed + 1, outputs, inputs, dtype=dtype)
    bias = random(seed + 2, outputs) if biased else None
    matrix = packed(weight, bias)
    expected, allowed = exact_linear(x, weight, bias), sum_error(x, weight, bias)
    stored = product(isa, x, matrix)
    check_close(stored, expected, allowed)
    before = random(seed + 3, rows, outputs)
    check_close(product(isa, x, matrix, "add", added_to=before), expected + before, allowed + 1e-6)
    # A row's numbers are its own: the same alone, and whoever computes it.
    row = seed % rows
    assert torch.equal(product(isa, x[row : row + 1], matrix, threads=1), stored[row : row + 1])


@kinds
@modest
@given(rows=ROWS, inputs=SIZES, outputs=SIZES, biased=st.booleans(), seed=SEEDS)
def test_products(isa: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int, biased: bool, seed: int) -> None:
    check_product(isa, dtype, rows, inputs, outputs, biased, seed)


LARGE = [(3000, 7, 40), (515, 1536, 70), (2, 64, 49_152), (5, 9_001, 33), (130, 8_192, 32), (3, 16_400, 31)]


@kinds
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_products(isa: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    check_product(isa, dtype, *shape, biased=True, seed=shape[0])


@kinds
@modest
@given(rows=ROWS, inputs=SIZES, width=SIZES, biased=st.booleans(), narrow=st.booleans(), seed=SEEDS)
def test_gated_products(
    isa: str, dtype: torch.dtype, rows: int, inputs: int, width: int, biased: bool, narrow: bool, seed: int
) -> None:
    out = BF16 if narrow else F32
    x, weight = random(seed, rows, inputs, dtype=narrow_of(dtype)), random(seed + 1, 2 * width, inputs, dtype=dtype)
    bias = random(seed + 2, 2 * width) if biased else None
    found = product(isa, x, packed(weight, bias, gated=True), "gate", out=out, activation="silu")
    expected = reference.gated_linear(x.double(), dense(weight, bias))
    gate, up = exact_linear(x, weight, bias).abs().chunk(2, dim=1)
    off_gate, off_up = sum_error(x, weight, bias).chunk(2, dim=1)
    # silu's slope is below 1.1; its exponential is good to a few roundings.
    allowed = 1.1 * off_gate * (up + off_up) + off_up * gate + 8 * FLOAT32_STEP * gate * up
    rounding = BFLOAT16_STEP * expected.abs() * 1.01 if narrow else 0
    check_close(found, expected, allowed + rounding + 1e-30)


def test_gates_of_any_size_are_finite() -> None:
    gates = torch.tensor([-3e38, -1e4, -90.0, -87.0, -20.0, 0.0, 20.0, 90.0, 1e4, 1e19])
    weight = torch.cat((gates, torch.ones(len(gates))))[:, None]
    for isa in ISAS:
        found = product(isa, torch.ones(1, 1), packed(weight, gated=True), "gate", activation="silu")
        check_close(found, torch.nn.functional.silu(gates.double())[None], 1e-30 + 4e-7 * gates.abs()[None])


@kinds
def test_products_of_picked_rows(isa: str, dtype: torch.dtype) -> None:
    """A head: the norm of rows in any order, one of them twice, and their product; then of other rows."""
    weight, scale = random(1, 70, 45, dtype=dtype), random(2, 45)
    x, matrix, vector = random(3, 9, 45), packed(weight), padded_vector(scale)
    plan = _cpu.Plan(team(isa), isa)
    source = buffer(plan, 45, F32, x)
    plan.begin_head()
    rows, logits = buffer(plan, 45, narrow_of(dtype)), buffer(plan, 70)
    plan.norm(source, vector.data_ptr(), EPS, rows, True)
    plan.linear(rows, matrix.packed, logits, "store", True)
    run(plan, 9, [8, 0, 3, 3])
    for picked in ([8, 0, 3, 3], [1], [], [*range(9), *range(9)]):
        plan.run_head(np.array(picked, np.int64))
        normed = read(plan, rows, len(picked))
        assert torch.equal(normed, norm(isa, x, scale, EPS, narrow_of(dtype))[picked])
        check_close(read(plan, logits, len(picked)), exact_linear(normed, weight), sum_error(normed, weight))
        assert np.array_equal(plan.view(logits, len(picked)), plan.read(logits, len(picked)))


def test_a_row_that_is_not_finite_is_forgotten() -> None:
    """Padding of the residual stream stays zero: a NaN in one step's row does not meet the next step's."""
    table, weight = random(1, 4, 40), random(2, 40, 33)
    table[0, 7] = torch.nan
    for isa in ISAS:
        plan = _cpu.Plan(team(isa), isa)
        residual, x, normed = buffer(plan, 40), buffer(plan, 33, F32, torch.full((1, 33), torch.nan)), buffer(plan, 40)
        ones, embedding, matrix = torch.ones(64), packed(table), packed(weight)
        plan.embedding(embedding.packed, residual)
        plan.linear(x, matrix.packed, residual, "add", False)
        plan.norm(residual, ones.data_ptr(), EPS, normed, False)
        run(plan, 1)
        assert torch.isnan(read(plan, normed, 1)).all()
        plan.write(x, np.ones((1, 33), np.float32))
        run(plan, 1, token_ids=torch.tensor([1]))
        assert torch.isfinite(read(plan, normed, 1)).all()


@isas
@modest
@given(rows=ROWS, width=st.one_of(st.integers(1, 200), st.integers(201, 5000)), narrow=st.booleans(), seed=SEEDS)
def test_norms(isa: str, rows: int, width: int, narrow: bool, seed: int) -> None:
    x, weight = random(seed, min(rows, 40), width) * 3, random(seed + 1, width)
    out = BF16 if narrow else F32
    found = norm(isa, x, weight, EPS, out)
    expected = reference.rms_norm(x.double(), None, weight.double(), EPS)[0]
    check_close(found, expected, expected.abs() * (1e-6 + (1.01 * BFLOAT16_STEP if narrow else 0)) + 1e-30)


@isas
def test_norms_of_thousands_of_rows(isa: str) -> None:
    x, weight = random(1, 3001, 17), random(2, 17)
    expected = reference.rms_norm(x.double(), None, weight.double(), EPS)[0]
    check_close(norm(isa, x, weight, EPS), expected, expected.abs() * 1e-6 + 1e-30)


@isas
@pytest.mark.parametrize("dtype", DTYPE_LIST, ids=kind_id)
@modest
@given(rows=ROWS, width=SIZES, vocabulary=SIZES, seed=SEEDS)
def test_embeddings(isa: str, dtype: torch.dtype, rows: int, width: int, vocabulary: int, seed: int) -> None:
    weight = random(seed, vocabulary, width, dtype=dtype)
    ids = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(seed))
    plan = _cpu.Plan(team(isa), isa)
    out, table = buffer(plan, width), packed(weight)
    plan.embedding(table.packed, out)
    run(plan, rows, token_ids=ids)
    assert torch.equal(read(plan, out, rows), weight[ids].float())


@isas
def test_embeddings_of_wide_rows(isa: str) -> None:
    """A row of the table that does not fit the room for products."""
    weight = random(1, 3, 20_000, dtype=BF16)
    plan = _cpu.Plan(team(isa), isa)
    out, table = buffer(plan, 20_000), packed(weight)
    plan.embedding(table.packed, out)
    run(plan, 2, token_ids=torch.tensor([2, 0]))
    assert torch.equal(read(plan, out, 2), weight[[2, 0]].float())


HEAD_DIMS = [2, 6, 18, 32, 64, 80, 96, 128, 256]


def check_rotary(
    isa: str, dtypes: tuple[torch.dtype, torch.dtype], tokens: int, kv_heads: int, group: int, head_dim: int, half: int,
    normed: bool, seed: int,
) -> None:  # fmt: skip
    """half: 0: nothing is rotated."""
    query_dtype, pool_dtype = dtypes
    heads = kv_heads * group
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(tokens + 5, generator=generator)[:tokens]
    positions = torch.randint(30_000, (tokens,), generator=generator)
    qkv = random(seed, tokens, (heads + 2 * kv_heads) * head_dim) * 2
    rotary = RotaryFrequencies(random(seed + 1, max(half, 1)).abs(), 1.25)
    norms = [random(seed + 2 + i, head_dim) if normed else None for i in range(2)]
    # Two layers' pools in one: strides are the caller's.
    pools = [torch.full((kv_heads, 2, tokens + 5, head_dim), 9.0, dtype=pool_dtype) for _ in range(2)]
    keys, values = (pool[:, 1] for pool in pools)
    plan = _cpu.Plan(team(isa), isa)
    padded = -(-head_dim // PANEL) * PANEL
    source = buffer(plan, qkv.shape[1], F32, qkv)
    cosines, sines = (buffer(plan, half) if half else None for _ in range(2))
    queries = buffer(plan, heads * padded, query_dtype)
    vectors = [None if v is None else padded_vector(v) for v in norms]
    addresses = [0 if v is None else v.data_ptr() for v in vectors]
    if cosines is not None and sines is not None:
        plan.angles(rotary.inverse.data_ptr(), half, rotary.factor, cosines, sines)
    plan.rotary_store(
        source, cosines, sines, queries, addresses[0], addresses[1], EPS, keys.data_ptr(), values.data_ptr(),
        DTYPES[pool_dtype], keys.stride(1) * keys.itemsize, keys.stride(0) * keys.itemsize, heads, kv_heads, head_dim,
        half,
    )  # fmt: skip
    run(plan, tokens, positions=positions, slots=slots)

    batch = batch_of([(tokens, slots.tolist())], positions.tolist())
    expected_keys, expected_values = (torch.full((kv_heads, tokens + 5, head_dim), 9.0).double() for _ in range(2))
    exact_norms = [None if v is None else v.double() for v in norms]
    step = reference.begin_step(batch, (rotary,), kv_heads, (None,))
    expected = reference.rotary_store(
        qkv.double(), exact_norms[0], exact_norms[1], EPS, expected_keys, expected_values, 0 if half else None, step
    )
    steps = {F32: 0.0, BF16: BFLOAT16_STEP, F16: 2.0**-11}
    found = read(plan, queries, tokens).view(tokens, heads, padded)
    check_close(
        found[..., :head_dim], expected, 4e-6 * (1 + expected.abs().amax()) + 1.01 * steps[query_dtype] * expected.abs()
    )
    assert (found[..., head_dim:] == 0).all()
    largest = 4e-6 * (1 + expected_keys.abs().amax())
    check_close(keys, expected_keys, largest + 1.01 * steps[pool_dtype] * expected_keys.abs())
    assert torch.equal(values, expected_values.to(F32).to(pool_dtype))
    for pool in pools:
        assert (pool[:, 0] == 9).all()


@isas
@modest
@given(
    query_dtype=st.sampled_from([F32, BF16]), pool_dtype=st.sampled_from(DTYPE_LIST),
    tokens=st.one_of(st.integers(1, 9), st.integers(10, 150)), kv_heads=st.integers(1, 3), group=st.integers(1, 4),
    head_dim=st.sampled_from(HEAD_DIMS), normed=st.booleans(), data=st.data(),
)  # fmt: skip
def test_rotary_and_store(isa: str, query_dtype: torch.dtype, pool_dtype: torch.dtype, data: Any, **sizes: Any) -> None:
    half = data.draw(st.integers(0, sizes["head_dim"] // 2), "half")
    check_rotary(isa, (query_dtype, pool_dtype), half=half, seed=data.draw(SEEDS, "seed"), **sizes)


@isas
@pytest.mark.parametrize("head_dim", [2, 64, 256])
def test_rotary_of_whole_heads(isa: str, head_dim: int) -> None:
    for normed in (False, True):
        check_rotary(isa, (BF16, BF16), 600, 2, 3, head_dim, head_dim // 2, normed, seed=head_dim)


@pytest.mark.parametrize("dtype", DTYPE_LIST, ids=kind_id)
@settings(max_examples=60, deadline=None)
@given(half=SIZES, inputs=SIZES, gated=st.booleans(), seed=SEEDS, data=st.data())
def test_matrices_are_written_and_read_in_any_pieces(
    dtype: torch.dtype, half: int, inputs: int, gated: bool, seed: int, data: Any
) -> None:
    outputs = 2 * half if gated else half
    weight, bias = random(seed, outputs, inputs, dtype=dtype), random(seed + 1, outputs)
    matrix = packed_matrix(outputs, inputs, dtype, bias=True, gated=gated, arena=_cpu.Arena())
    for place, whole in ((matrix.rows(0, outputs), weight), (matrix.bias(0, outputs), bias)):
        cuts = data.draw(st.lists(st.integers(0, outputs), max_size=5), "cuts")
        bounds = [0, *sorted(cuts), outputs]
        for first, last in data.draw(st.permutations(list(pairwise(bounds))), "order"):
            place.write(first, whole[first:last])
        assert torch.equal(place.read(), whole)
    first = data.draw(st.integers(0, outputs), "first")
    last = data.draw(st.integers(first, outputs), "last")
    assert torch.equal(matrix.rows(first, last).read(), weight[first:last])
    assert torch.equal(matrix.bias(first, last).read(), bias[first:last])
    # Written over in part, the rest is as it was.
    matrix.rows(first, last).write(0, -weight[first:last])
    weight[first:last] *= -1
    assert torch.equal(matrix.rows(0, outputs).read(), weight)


@pytest.mark.parametrize("isa", BFLOAT16_ISAS)
def test_bfloat16_is_rounded_to_nearest_even(isa: str) -> None:
    """Numbers halfway between two of bfloat16, infinities and NaN, through a buffer of it."""
    halfway = torch.arange(0x3F808000, 0x3F808000 + 64 * 0x10000, 0x10000, dtype=torch.int64).to(torch.int32)
    values = torch.cat((halfway.view(F32), torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38, -0.0])))[None]
    plan = _cpu.Plan(team(isa), isa)
    number = buffer(plan, values.shape[1], BF16, values)
    assert torch.equal(read(plan, number, 1).nan_to_num(7), values.to(BF16).float().nan_to_num(7))
