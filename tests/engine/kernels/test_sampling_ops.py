"""The reductions of sampling on every instruction set, against the reference and against plain float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from backends import BFLOAT16_ISAS, backend
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.kernels.table import Backend, Logprobs

LARGEST = float(np.finfo(np.float32).max)
NEAR = 1e-6
"""How close to a boundary a uniform may be before another id is as good."""

EACH_ISA = pytest.mark.parametrize("isa", BFLOAT16_ISAS)
WIDTHS = st.one_of(st.integers(1, 70), st.integers(71, 5000))
TEMPERATURES = st.sampled_from([1e-6, 1e-3, 0.3, 0.8, 1.0, 1.7, 50.0, 1e30, 1e308])
TOP_KS = st.sampled_from([-1, 1, 2, 5, 50, 255, 256, 257, 1000, 2048, 3000, 10**9])
TOP_PS = st.sampled_from([1.0, 0.999999, 0.95, 0.9, 0.5, 0.05, 1e-9])
MIN_PS = st.sampled_from([0.0, 0.0, 1e-6, 0.02, 0.3, 1.0])
UNIFORMS = st.one_of(
    st.sampled_from([0.0, 0.5, float(np.nextafter(1.0, 0.0))]), st.floats(0, 1, exclude_max=True, width=32)
)


def backends() -> list[Backend]:
    return [backend(name) for name in ("reference", *BFLOAT16_ISAS)]


def rows_of(seed: int, count: int, width: int, kind: str, gap: int = 0) -> torch.Tensor:
    """Logits [count, width], `gap` floats of something else behind each row."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.full((count, width + gap), 1e30)
    logits = torch.randn(count, width, generator=generator) * 3
    if kind == "ties":
        logits = torch.randint(-3, 4, (count, width), generator=generator).float() * 0.5
        logits[logits == 0] = torch.where(torch.rand((logits == 0).sum(), generator=generator) < 0.5, 0.0, -0.0)
    elif kind == "wide":
        logits = logits * 30
    elif kind == "masked":
        hidden = torch.rand(count, width, generator=generator) < 0.9
        hidden[torch.arange(count), torch.randint(0, width, (count,), generator=generator)] = False
        logits[hidden] = -torch.inf
    elif kind == "equal":
        logits = torch.full((count, width), 2.5)
    elif kind == "extreme":
        logits[logits > 3] = LARGEST  # what a bias may leave
        logits[logits < -3] = -torch.inf
        logits[:, width // 2] = 0.0
    whole[:, :width] = logits
    return whole[:, :width]


LOGITS = st.builds(
    rows_of,
    st.integers(0, 2**31),
    st.integers(1, 40),
    WIDTHS,
    st.sampled_from(["plain", "ties", "wide", "masked", "equal", "extreme"]),
    st.sampled_from([0, 1, 31]),
)


@dataclass
class Draws:
    """Columns of `Backend.draw`, as lists."""

    rows: list[int] = field(default_factory=list)
    temperatures: list[float] = field(default_factory=list)
    top_ks: list[int] = field(default_factory=list)
    top_ps: list[float] = field(default_factory=list)
    min_ps: list[float] = field(default_factory=list)
    uniforms: list[float] = field(default_factory=list)

    def add(self, row: int, uniform: float, temperature: float = 1.0, top_k: int = -1, **rest: float) -> None:
        self.rows.append(row)
        self.temperatures.append(temperature)
        self.top_ks.append(top_k)
        self.top_ps.append(rest.get("top_p", 1.0))
        self.min_ps.append(rest.get("min_p", 0.0))
        self.uniforms.append(uniform)

    def of(self, ops: Backend, logits: torch.Tensor) -> list[int]:
        return ops.draw(
            logits,
            np.array(self.rows, np.int64),
            np.array(self.temperatures, np.float64),
            np.array(self.top_ks, np.int64),
            np.array(self.top_ps, np.float64),
            np.array(self.min_ps, np.float64),
            np.array(self.uniforms, np.float64),
        ).tolist()

    def alone(self, index: int) -> Draws:
        return Draws(*([column[index]] for column in vars(self).values()))


@st.composite
def some_draws(draw: Any, count: int) -> Draws:
    draws = Draws()
    for _ in range(draw(st.integers(1, 12))):
        draws.add(
            draw(st.integers(0, count - 1)),
            draw(UNIFORMS),
            draw(TEMPERATURES),
            draw(TOP_KS),
            top_p=draw(TOP_PS),
            min_p=draw(MIN_PS),
        )
    return draws


def check_draw(logits: NDArray[np.float32], draws: Draws, index: int, drawn: int) -> None:
    """Check one draw against the inverse distribution function in float64, with room only near its boundaries."""
    temperature, top_k, top_p = draws.temperatures[index], draws.top_ks[index], draws.top_ps[index]
    z = logits.astype(np.float64)
    weights = np.exp((z - z.max()) / min(temperature, LARGEST))
    order = np.argsort(-z, kind="stable")
    if 0 < top_k < len(z):
        order = order[:top_k]
    by_id = top_p == 1 and not 0 < top_k < len(z)
    before = np.cumsum(weights[order]) - weights[order]
    # The fewest and the most tokens that rounding may let top_p and min_p keep; as a rule these are the same.
    for p_slack, m_slack in product((-NEAR, NEAR), (-NEAR, NEAR)):
        kept = order if top_p == 1 else order[before <= (top_p + p_slack) * weights.sum()]
        kept = kept[weights[kept] >= draws.min_ps[index] * (1 + m_slack)]
        kept = order[:1] if len(kept) == 0 else np.sort(kept) if by_id else kept
        sums = np.cumsum(weights[kept])
        near = np.clip([draws.uniforms[index] - NEAR, draws.uniforms[index] + NEAR], 0, 1) * sums[-1]
        low, high = np.searchsorted(sums, near, side="right")
        if drawn in kept[low : high + 1] and weights[drawn] > 0:
            return
    raise AssertionError(f"{drawn} is not the id at {draws.uniforms[index]}")


def check_all(ops: Backend, logits: torch.Tensor, draws: Draws) -> None:
    for index, drawn in enumerate(draws.of(ops, logits)):
        check_draw(logits[draws.rows[index]].numpy(), draws, index, drawn)


@settings(max_examples=200, deadline=None)
@given(LOGITS)
def test_the_best_of_each_row(logits: torch.Tensor) -> None:
    expected = [min(range(len(row)), key=lambda t: (-row[t], t)) for row in logits.tolist()]
    for ops in backends():
        ids, peaks = ops.best(logits)
        assert (ids.dtype, peaks.dtype) == (np.int64, np.float32)
        assert ids.tolist() == expected, ops.name
        assert peaks.tolist() == [logits[row, token].item() for row, token in enumerate(expected)]


@pytest.mark.parametrize("width", [1, 7, 8, 16, 17, 64, 1023, 1025, 5000])
def test_a_nan_or_an_infinity_anywhere_is_seen(width: int) -> None:
    places = sorted({0, width - 1, width // 2, *range(0, width, max(1, width // 40))})
    logits = rows_of(3, len(places), width, "plain", gap=5)
    for row, place in enumerate(places):
        logits[row, place] = torch.nan
    draws = Draws()
    for row in range(len(places)):
        draws.add(row, 0.7, top_p=0.9)
    for ops in backends():
        ids, peaks = ops.best(logits)
        assert np.isnan(peaks).all() and not ids.any(), ops.name
        assert draws.of(ops, logits) == [0] * len(places)
        found = logprobs(ops, logits, tops=[min(3, width)] * len(places), ids=[[0]] * len(places))
        assert np.isnan(np.concatenate([found.tokens, found.tops, found.ids])).all()
        assert found.top_ids.tolist() == list(range(min(3, width))) * len(places)
    for infinity in (torch.inf, -torch.inf):
        logits[:] = -torch.inf
        for row, place in enumerate(places):
            logits[row, place] = infinity
        for ops in backends():
            ids, peaks = ops.best(logits)
            assert ids.tolist() == (places if infinity > 0 else [0] * len(places)), ops.name
            assert peaks.tolist() == [infinity] * len(places)
            assert draws.of(ops, logits) == ids.tolist()
            assert np.isnan(logprobs(ops, logits, tops=[1] * len(places)).tops).all()


@settings(max_examples=250, deadline=None)
@given(st.data(), LOGITS)
def test_draws_are_where_the_distribution_says(data: st.DataObject, logits: torch.Tensor) -> None:
    draws = data.draw(some_draws(len(logits)))
    for ops in backends():
        check_all(ops, logits, draws)


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_draws_from_a_large_vocabulary(scale: float) -> None:
    logits = torch.randn(2, 151_936, generator=torch.Generator().manual_seed(5)) * scale
    logits[1, ::3] = -torch.inf
    draws = Draws()
    for row, top_k, top_p in product(range(2), (-1, 40, 5000, 100_000), (1.0, 0.9, 0.3)):
        draws.add(row, (0.0, 0.61)[row], 0.8, top_k, top_p=top_p, min_p=0.0 if top_k != 40 else 0.1)
    for ops in backends():
        check_all(ops, logits, draws)


@EACH_ISA
def test_draws_are_as_frequent_as_they_should_be(isa: str) -> None:
    """Pearson's chi-square of 20,000 draws; beyond five standard deviations would be a wonder."""
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(9)) * 1.5
    draws, count = Draws(), 20_000
    for uniform in np.random.default_rng(1).random(count):
        draws.add(0, float(uniform), 1.3, min_p=0.01)
    weights = torch.softmax(logits[0].double() / 1.3, dim=-1)
    weights[weights < 0.01 * weights.max()] = 0
    expected = (weights / weights.sum() * count).numpy()
    found = np.bincount(draws.of(backend(isa), logits), minlength=60)
    assert not found[expected == 0].any()
    kept = expected > 0
    chi_square = ((found[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def logprobs(
    ops: Backend,
    logits: torch.Tensor,
    *,
    temperatures: list[float] | None = None,
    tokens: list[int] | None = None,
    tops: list[int] | None = None,
    ids: list[list[int]] | None = None,
    rows: list[int] | None = None,
) -> Logprobs:
    rows = list(range(len(logits))) if rows is None else rows
    count = len(rows)
    ids = ids or [[]] * count
    return ops.logprobs(
        logits,
        np.array(rows, np.int64),
        np.array(temperatures or [1.0] * count, np.float64),
        np.array(tokens or [0] * count, np.int64),
        np.array(tops or [0] * count, np.int64),
        np.array([len(entry) for entry in ids], np.int64),
        np.array([token for entry in ids for token in entry], np.int64),
    )


@settings(max_examples=200, deadline=None)
@given(st.data(), LOGITS)
def test_logprobs_are_those_of_a_log_softmax(data: st.DataObject, logits: torch.Tensor) -> None:
    count, width = logits.shape
    rows = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=12))
    column = {
        "temperatures": [data.draw(TEMPERATURES) for _ in rows],
        "tokens": [data.draw(st.integers(0, width - 1)) for _ in rows],
        "tops": [min(width, data.draw(st.sampled_from([0, 1, 5, 20, 300, 4000]))) for _ in rows],
        "ids": [data.draw(st.lists(st.integers(0, width - 1), max_size=4)) for _ in rows],
    }
    expected = Logprobs(np.empty(0), np.empty(0, np.int64), np.empty(0), np.empty(0))
    for row, temperature, token, top, ids in zip(rows, *column.values(), strict=True):
        z = logits[row].double()
        cooled = torch.log_softmax((z - z.max()) / min(temperature, LARGEST), dim=-1).clamp(min=-2 * LARGEST).numpy()
        best = np.argsort(-logits[row].numpy(), kind="stable")[:top]
        expected = Logprobs(
            np.append(expected.tokens, cooled[token]),
            np.append(expected.top_ids, best),
            np.append(expected.tops, cooled[best]),
            np.append(expected.ids, cooled[ids]),
        )
    for ops in backends():
        found = logprobs(ops, logits, rows=rows, **column)
        assert found.top_ids.tolist() == expected.top_ids.tolist(), ops.name
        for name in ("tokens", "tops", "ids"):
            values = np.maximum(getattr(found, name).astype(np.float64), -2 * LARGEST)
            wanted = getattr(expected, name)
            assert getattr(found, name).dtype == np.float32
            close = np.isclose(values, wanted, rtol=2e-6, atol=2e-6)
            assert (close | ((values < -LARGEST) & (wanted < -LARGEST * (1 - 1e-6)))).all(), ops.name


@EACH_ISA
@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 2**31), st.sampled_from([50, 3000, 20_000]))
def test_neither_threads_nor_company_change_a_bit(isa: str, data: st.DataObject, seed: int, width: int) -> None:
    count = 24
    logits = rows_of(seed, count, width, data.draw(st.sampled_from(["plain", "ties", "wide"])), gap=3)
    draws = data.draw(some_draws(count))
    tops = [row % 7 for row in range(count)]
    temperatures = [0.5 + row / 7 for row in range(count)]
    results = [
        (
            [column.tobytes() for column in ops.best(logits)],
            draws.of(ops, logits),
            [column.tobytes() for column in logprobs(ops, logits, temperatures=temperatures, tops=tops)],
        )
        for ops in (backend(isa, 1), backend(isa, 2), backend(isa, 3))
    ]
    assert results[0] == results[1] == results[2]
    ops = backend(isa, 2)
    ids, peaks = ops.best(logits)
    found = logprobs(ops, logits, temperatures=temperatures, tops=tops)
    starts = np.cumsum([0, *tops])
    for row in range(0, count, 5):
        alone = logits[row : row + 1].clone()
        (token,), (peak,) = ops.best(alone)
        assert (token, peak.tobytes()) == (ids[row], peaks[row].tobytes())
        only = logprobs(ops, alone, temperatures=temperatures[row : row + 1], tops=tops[row : row + 1])
        assert only.tokens.tobytes() == found.tokens[row : row + 1].tobytes()
        assert only.top_ids.tolist() == found.top_ids[starts[row] : starts[row + 1]].tolist()
        assert only.tops.tobytes() == found.tops[starts[row] : starts[row + 1]].tobytes()
    for index, drawn in enumerate(results[0][1]):
        assert draws.alone(index).of(ops, logits) == [drawn]


@EACH_ISA
def test_wrong_arguments_are_refused(isa: str) -> None:
    ops = backend(isa)
    logits = torch.zeros(2, 8)
    for row, top_k in ((2, 1), (-1, 1), (0, 0)):
        draws = Draws()
        draws.add(row, 0.5, top_k=top_k)
        with pytest.raises((IndexError, ValueError)):
            draws.of(ops, logits)
    for wrong in ({"tokens": [0, 8]}, {"tops": [9, 0]}, {"tops": [-1, 1]}, {"ids": [[], [-1]]}, {"rows": [0, 2]}):
        with pytest.raises((IndexError, ValueError)):
            logprobs(ops, logits, **wrong)  # type: ignore[arg-type]
    with pytest.raises((ValueError, TypeError)):
        ops.best(torch.zeros(8, 2).T)
    with pytest.raises((ValueError, TypeError)):
        ops.best(torch.zeros(2, 8, dtype=torch.float64))
