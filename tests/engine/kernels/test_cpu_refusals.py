"""What the kernels would have to trust is refused before it comes to them: never a crash, never silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from backends import ISAS
from plans import BF16, F16, F32, buffer, packed, random, team

from engine.kernels import _cpu
from engine.kernels.packed import DTYPES, packed_matrix

WEIGHTS = {dtype: packed(random(1, 6, 5, dtype=dtype)) for dtype in (F32, BF16, F16)}
GATED = packed(random(1, 6, 5), gated=True)
ONES = torch.ones(64)
POOL = torch.zeros(2, 9, 8)


def new_plan() -> _cpu.Plan:
    return _cpu.Plan(team(ISAS[0]), ISAS[0])


def linear(
    inputs: int = 5, narrow: torch.dtype = F32, outputs: int = 6, out: torch.dtype = F32, epilogue: str = "store",
    matrix: Any = WEIGHTS[F32], activation: str = "identity",
) -> None:  # fmt: skip
    plan = new_plan()
    plan.linear(buffer(plan, inputs, narrow), matrix.packed, buffer(plan, outputs, out), epilogue, False, activation)


def test_products_that_fit_are_taken() -> None:
    linear()
    linear(matrix=WEIGHTS[F16])
    linear(matrix=WEIGHTS[BF16], narrow=BF16)
    linear(matrix=GATED, outputs=3, out=BF16, epilogue="gate", activation="silu")
    linear(out=BF16, activation="gelu")
    linear(epilogue="add")


@pytest.mark.parametrize(
    "wrong",
    [
        {"inputs": 6}, {"outputs": 5}, {"narrow": BF16}, {"out": BF16, "epilogue": "add"},
        {"epilogue": "add", "activation": "relu"}, {"activation": "swish"}, {"epilogue": "sotre"}, {"epilogue": "gate"},
        {"matrix": WEIGHTS[BF16]}, {"matrix": WEIGHTS[BF16], "narrow": F16}, {"matrix": GATED},
        {"matrix": GATED, "epilogue": "gate"}, {"matrix": GATED, "outputs": 3},
    ],
    ids=str,
)  # fmt: skip
def test_products_that_do_not_fit(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"fit|epilogue|activation is 'swish'; allowed are gelu"):
        linear(**wrong)


def test_a_product_onto_itself() -> None:
    plan, square = new_plan(), packed(random(1, 5, 5))
    x = buffer(plan, 5)
    with pytest.raises(ValueError, match="fit"):
        plan.linear(x, square.packed, x, "store", False)


def test_buffers_that_do_not_exist() -> None:
    plan = new_plan()
    good = buffer(plan, 5)
    calls: list[Callable[[int], Any]] = [
        lambda bad: plan.linear(bad, WEIGHTS[F32].packed, good, "store", False),
        lambda bad: plan.linear(good, WEIGHTS[F32].packed, bad, "store", False),
        lambda bad: plan.norm(bad, ONES.data_ptr(), 1e-5, good, False),
        lambda bad: plan.embedding(WEIGHTS[F32].packed, bad),
        lambda bad: plan.view(bad, 0),
        lambda bad: plan.read(bad, 0),
        lambda bad: plan.write(bad, np.zeros((1, 5), np.float32)),
    ]
    for call in calls:
        for bad in (-1, 1, 2**31 - 1):
            with pytest.raises(IndexError):
                call(bad)


@pytest.mark.parametrize("width", [0, -1, -(2**31)])
def test_buffers_without_width(width: int) -> None:
    with pytest.raises(ValueError, match="width"):
        new_plan().buffer(width, 0)


@pytest.mark.parametrize("dtype", [-1, 3])
def test_unknown_dtypes(dtype: int) -> None:
    with pytest.raises(ValueError, match="dtype"):
        new_plan().buffer(5, dtype)
    with pytest.raises(ValueError, match="dtype"):
        _cpu.Matrix(5, 5, dtype, False, False)


def test_rows_of_buffers() -> None:
    plan = new_plan()
    wide, narrow = buffer(plan, 5, F32, torch.zeros(3, 5)), buffer(plan, 5, BF16, torch.zeros(3, 5))
    for count in (-1, 4):
        with pytest.raises(ValueError, match="rows"):
            plan.view(wide, count)
        with pytest.raises(ValueError, match="rows"):
            plan.read(wide, count)
    with pytest.raises(ValueError, match="float32"):
        plan.view(narrow, 3)
    with pytest.raises(ValueError, match="width"):
        plan.write(wide, np.zeros((3, 6), np.float32))


def test_norms_embeddings_and_angles_that_do_not_fit() -> None:
    plan = new_plan()
    five, six, narrow, other = buffer(plan, 5), buffer(plan, 6), buffer(plan, 5, BF16), buffer(plan, 5)
    address, table, wider = ONES.data_ptr(), WEIGHTS[F32].packed, packed(random(1, 6, 6)).packed
    calls: list[Callable[[], Any]] = [
        lambda: plan.norm(five, address, 1e-5, six, False),
        lambda: plan.norm(narrow, address, 1e-5, five, False),
        lambda: plan.norm(five, 0, 1e-5, five, False),
        lambda: plan.embedding(WEIGHTS[F32].packed, six),
        lambda: plan.embedding(WEIGHTS[F32].packed, narrow),
        lambda: plan.angles(address, 6, 1.0, five, six),
        lambda: plan.angles(address, 5, 1.0, five, narrow),
        lambda: plan.angles(address, 0, 1.0, five, five),
        lambda: plan.angles(0, 5, 1.0, five, five),
        lambda: plan.add_norm(five, address, 1e-5, six),
        lambda: plan.add_norm(five, address, 1e-5, five),
        lambda: plan.add_norm(five, 0, 1e-5, other),
        lambda: plan.add_norm(narrow, address, 1e-5, five),
        lambda: plan.add_norm(five, address, 1e-5, narrow),
        lambda: plan.layer_norm(five, address, address, 1e-5, six, None),
        lambda: plan.layer_norm(five, address, address, 1e-5, narrow, None),
        lambda: plan.layer_norm(narrow, address, address, 1e-5, five, None),
        lambda: plan.layer_norm(five, address, address, 1e-5, other, six),
        lambda: plan.layer_norm(five, address, address, 1e-5, five, five),
        lambda: plan.layer_norm(five, 0, address, 1e-5, five, None),
        lambda: plan.layer_norm(five, address, 0, 1e-5, five, None),
        lambda: plan.embedding_sum(table, table, None, 0, six),
        lambda: plan.embedding_sum(table, table, None, 0, narrow),
        lambda: plan.embedding_sum(table, wider, None, 0, five),
        lambda: plan.embedding_sum(table, table, wider, 0, five),
        lambda: plan.embedding_sum(table, table, table, -1, five),
        lambda: plan.embedding_sum(table, table, table, 6, five),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="fit"):
            call()


def heads(
    kind: str, *, width: int = 64, queries: torch.dtype = F32, projections: int = 48, half: int = 4, angles: int = 4,
    turned: str = "both", causal: bool = True,
    norms: tuple[int, int] = (0, 0), heads: int = 2, kv_heads: int = 2, head_dim: int = 8, keys: int = 1,
    pool: torch.dtype = F32, out: int = 16, window: int = 0,
) -> None:  # fmt: skip
    """Record a rotary_store or an attention over two heads of 8 channels, but for what is asked to be wrong."""
    plan = new_plan()
    address = POOL.data_ptr()
    memory = (address * keys, address, DTYPES[pool], 32, 288)
    source, target = buffer(plan, width, queries), buffer(plan, out)
    if kind == "attention":
        plan.attention(source, *memory, target, 1.0, heads, kv_heads, head_dim, window, causal)
    else:
        qkv = buffer(plan, projections)
        cosines, sines = (buffer(plan, angles) if turned in ("both", which) else None for which in ("cosines", "sines"))
        plan.rotary_store(qkv, cosines, sines, source, *norms, 1e-5, *memory, heads, kv_heads, head_dim, half)


def test_heads_that_fit_are_taken() -> None:
    heads("rotary")
    heads("rotary", turned="none", half=0)
    heads("attention")
    heads("attention", causal=False)
    heads("attention", pool=BF16, queries=BF16, window=7)


SHARED: list[dict[str, Any]] = [
    {"width": 32}, {"heads": 3}, {"kv_heads": 0}, {"kv_heads": -2}, {"kv_heads": 3}, {"heads": 0}, {"heads": -2},
    {"head_dim": 0}, {"head_dim": -8}, {"head_dim": 9}, {"head_dim": 2**30}, {"keys": 0},
]  # fmt: skip
ROTARY: list[dict[str, Any]] = [
    {"projections": 49}, {"half": 0}, {"half": -4}, {"half": 5, "angles": 5}, {"angles": 3},
    {"turned": "none"}, {"turned": "cosines"}, {"turned": "sines", "half": 0},
    {"norms": (ONES.data_ptr(), 0)}, {"norms": (0, ONES.data_ptr())},
]  # fmt: skip
ATTENTION: list[dict[str, Any]] = [
    {"out": 15}, {"window": -1}, {"window": 7, "causal": False},
    {"queries": BF16}, {"queries": F16, "pool": F16}, {"queries": BF16, "pool": F16},
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        *[("rotary", wrong) for wrong in SHARED + ROTARY],
        *[("attention", wrong) for wrong in SHARED + ATTENTION],
    ],
    ids=str,
)
def test_heads_that_do_not_fit(kind: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"fit|queries are"):
        heads(kind, **wrong)


def test_the_head_is_apart() -> None:
    """Picked rows are counted in buffers of their own: ops of either kind do not touch the other's."""
    plan, weights, ones = new_plan(), WEIGHTS[F32].packed, ONES.data_ptr()
    x, y, z = buffer(plan, 5), buffer(plan, 6), buffer(plan, 5)
    before: list[Callable[[], Any]] = [
        lambda: plan.norm(x, ones, 1e-5, x, True),
        lambda: plan.linear(x, weights, y, "store", True),
        lambda: plan.pool(x, x),
        lambda: plan.narrow(x, z),
    ]
    plan.norm(x, ones, 1e-5, x, False)
    for call in before:
        with pytest.raises(ValueError, match="begin_head"):
            call()
    plan.begin_head()
    rows, logits, more = buffer(plan, 5), buffer(plan, 6), buffer(plan, 5)
    after: list[Callable[[], Any]] = [
        lambda: plan.norm(x, ones, 1e-5, x, True),
        lambda: plan.norm(rows, ones, 1e-5, rows, True),
        lambda: plan.norm(x, ones, 1e-5, rows, False),
        lambda: plan.linear(x, weights, logits, "store", True),
        lambda: plan.linear(rows, weights, y, "store", True),
        lambda: plan.linear(rows, weights, logits, "store", False),
        lambda: plan.embedding(weights, rows),
        lambda: plan.angles(ones, 5, 1.0, rows, rows),
        lambda: plan.embedding_sum(weights, weights, None, 0, rows),
        lambda: plan.add_norm(rows, ones, 1e-5, more),
        lambda: plan.layer_norm(rows, ones, ones, 1e-5, rows, None),
        lambda: plan.pool(rows, more),
        lambda: plan.pool(x, z),
        lambda: plan.narrow(x, rows),
        lambda: plan.narrow(rows, z),
    ]
    for call in after:
        with pytest.raises(ValueError, match="begin_head"):
            call()
    for call in (lambda: plan.pool(x, logits), lambda: plan.narrow(rows, logits), lambda: plan.narrow(rows, rows)):
        with pytest.raises(ValueError, match="fit"):
            call()
    plan.norm(x, ones, 1e-5, rows, True)
    plan.pool(x, rows)
    plan.narrow(rows, more)
    plan.linear(rows, weights, logits, "store", True)


def test_poolings_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="pooling is 'last'; allowed are first, max, mean, row"):
        new_plan().begin_head("last")


def step(**changes: Any) -> list[Any]:
    """The arrays of a step of 3 tokens of 2 sequences with 9 slots."""
    good = {
        "token_ids": [0, 5, 1], "positions": [3, 4, 3], "slots": [0, 1, 2], "query_starts": [0, 2, 3],
        "context_starts": [0, 5, 9], "context_slots": list(range(9)), "picked": [2, 0], "type_ids": [0, 0, 0],
    }  # fmt: skip
    return [np.array(values, np.int64) for values in (good | changes).values()]


def step_plan() -> _cpu.Plan:
    plan = new_plan()
    residual, ones = buffer(plan, 5), ONES.data_ptr()
    plan.embedding(WEIGHTS[F32].packed, residual)
    plan.begin_head()
    plan.norm(residual, ones, 1e-5, buffer(plan, 5), True)
    return plan


@pytest.mark.parametrize(
    "wrong",
    [
        {"type_ids": [0, 0]},
        {"token_ids": [0, 6, 1]}, {"token_ids": [0, -1, 1]}, {"token_ids": [0, 1]}, {"positions": [1, 2]},
        {"slots": [0, 1, 2, 3]}, {"query_starts": []}, {"query_starts": [0, 3]}, {"query_starts": [0, 2, 4]},
        {"query_starts": [1, 2, 3]}, {"query_starts": [0, 4, 3]}, {"query_starts": [0, 2, 2]},
        {"context_starts": [0, 5, 8]}, {"context_starts": [0, 5, 10]}, {"context_starts": [0, -1, 9]},
        {"context_starts": [0, 1, 9]}, {"context_slots": list(range(8))}, {"picked": [3]}, {"picked": [-1]},
        {"picked": [0, 2**40]},
    ],
    ids=str,
)  # fmt: skip
def test_steps_that_contradict_themselves(wrong: dict[str, Any]) -> None:
    plan = step_plan()
    plan.run(*step())
    with pytest.raises(ValueError):
        plan.run(*step(**wrong))
    plan.run(*step())


def test_heads_of_rows_that_were_not_computed() -> None:
    plan = step_plan()
    with pytest.raises(ValueError, match="picked"):
        plan.run_head(np.array([0]))
    plan.run(*step())
    plan.run_head(np.array([2, 2, 2, 2, 2, 0]))
    for row in (-1, 3):
        with pytest.raises(ValueError, match="picked"):
            plan.run_head(np.array([row]))


def test_places_outside_a_matrix() -> None:
    matrix = packed_matrix(6, 5, F32, bias=True, gated=False, arena=_cpu.Arena())
    rows = torch.zeros(2, 5)
    for start in (-1, 5, 2**31 - 1):
        for call in (matrix.packed.write, matrix.packed.read):
            with pytest.raises(ValueError, match="rows"):
                call(start, rows)
        with pytest.raises(ValueError, match="entries"):
            matrix.packed.write_bias(start, np.zeros(2, np.float32))
        with pytest.raises(ValueError, match="entries"):
            matrix.packed.read_bias(start, torch.zeros(2))
    with pytest.raises(IndexError):
        matrix.rows(2, 4).write(1, rows)
    with pytest.raises(ValueError, match="entries"):
        packed_matrix(6, 5, F32, bias=False, gated=False, arena=_cpu.Arena()).bias(0, 6).write(0, torch.zeros(6))


def test_matrices_filled_from_or_into_what_does_not_fit() -> None:
    matrix = packed_matrix(6, 5, F32, bias=True, gated=False, arena=_cpu.Arena()).packed
    for rows in (torch.zeros(6, 4), torch.zeros(6, 5, dtype=F16), torch.zeros(6, 5, dtype=torch.float64)):
        with pytest.raises(ValueError, match="width and dtype"):
            matrix.write(0, rows)
        with pytest.raises((ValueError, TypeError)):
            matrix.read(0, rows)
    # What would be filled is a copy, and lost.
    for lost in (torch.zeros(5, 6).T, torch.zeros(6, 10)[:, ::2]):
        with pytest.raises(TypeError):
            matrix.read(0, lost)
    for lost in (torch.zeros(6, dtype=torch.float64), torch.zeros(12)[::2]):
        with pytest.raises(TypeError):
            matrix.read_bias(0, lost)
    with pytest.raises(TypeError):
        matrix.write(0, torch.zeros(6))


@pytest.mark.parametrize(("outputs", "inputs", "gated"), [(0, 5, False), (5, 0, False), (-1, 5, False), (5, 5, True)])
def test_matrices_of_no_shape(outputs: int, inputs: int, gated: bool) -> None:
    with pytest.raises(ValueError):
        _cpu.Matrix(outputs, inputs, 0, gated, False)


def test_matrices_too_large_for_any_memory() -> None:
    with pytest.raises(MemoryError):
        _cpu.Matrix(2**31 - 1, 2**31 - 1, 0, False, False)


def test_teams_and_isas_that_there_are_not() -> None:
    for threads in (0, -3):
        with pytest.raises(ValueError, match="threads"):
            _cpu.Team(threads, [])
    with pytest.raises(ValueError, match="isa is 'avx3'; this machine can run "):
        _cpu.Plan(team(ISAS[0]), "avx3")
