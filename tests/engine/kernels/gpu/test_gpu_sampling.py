"""The reductions of sampling: the ids of the reference, and its logprobs within a rounding of float32."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from ragged import F32

from engine.kernels.eager import EagerBackend
from engine.kernels.gpu.backend import GpuBackend, open_gpu_backend
from engine.kernels.gpu.sampling import BLOCK, SECTION
from engine.kernels.table import Backend, Logprobs

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the NaN that tests put in
LARGEST = float(np.finfo(np.float32).max)
REFERENCE = EagerBackend()
WIDTHS = [1, 7, 300, BLOCK, BLOCK + 1]


@pytest.fixture(scope="module")
def backend(device: torch.device) -> GpuBackend:
    return open_gpu_backend(device)


def rows_of(kind: str, width: int) -> torch.Tensor:
    """Six rows of logits, with something else behind each of them."""
    generator = torch.Generator().manual_seed(width)
    whole = torch.full((6, width + 3), 1e30)
    logits = torch.randn(6, width, generator=generator) * 3
    if kind == "ties":
        logits = torch.randint(-3, 4, (6, width), generator=generator).float() * 0.5
        logits[:, ::2] *= -1.0  # among them both zeros
    elif kind == "masked":
        logits[torch.rand(6, width, generator=generator) < 0.9] = -torch.inf
        logits[:, width // 2] = 0.0
    elif kind == "extreme":
        logits[logits > 3] = LARGEST
        logits[logits < -3] = -torch.inf
    elif kind == "broken":
        logits[0, width // 2] = torch.nan
        logits[1] = -torch.inf
        logits[2, width - 1] = torch.inf
        logits[3, 0] = torch.nan
        logits[4, width - 1] = torch.nan
    whole[:, :width] = logits
    return whole[:, :width]


KINDS = pytest.mark.parametrize("kind", ["plain", "ties", "masked", "extreme", "broken"])


@pytest.mark.parametrize("width", [*WIDTHS, SECTION + 5, 3 * SECTION])
@KINDS
def test_best(backend: GpuBackend, kind: str, width: int) -> None:
    logits = rows_of(kind, width)
    for found, expected in zip(backend.best(logits), REFERENCE.best(logits), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def drawn(ops: Backend, logits: torch.Tensor, draws: list[tuple[int, float, int, float, float, float]]) -> list[int]:
    columns = list(zip(*draws, strict=True))
    kinds = (np.int64, np.float64, np.int64, np.float64, np.float64, np.float64)
    arrays = [np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
    return ops.draw(logits, *arrays).tolist()


@pytest.mark.parametrize("width", WIDTHS)
@KINDS
def test_draws(backend: GpuBackend, kind: str, width: int) -> None:
    """The very ids of the reference. Uniforms are drawn far finer than roundings, so none stands at a boundary."""
    generator, logits = np.random.default_rng(width), rows_of(kind, width)
    cuts = product((-1, 1, 5, 257, 10**9), (1.0, 0.9, 0.05), (0.0, 0.02))
    draws = [
        (int(generator.integers(6)), float(generator.choice([1e-6, 0.3, 1.0, 1.7, 50.0, 1e308])), k, p, m, uniform)
        for (k, p, m), uniform in zip(cuts, generator.random(60), strict=False)
    ]
    draws += [(row, 1.0, -1, 1.0, 0.0, uniform) for row in range(6) for uniform in (0.0, float(np.nextafter(1.0, 0.0)))]
    assert drawn(backend, logits, draws) == drawn(REFERENCE, logits, draws)


def test_a_draw_does_not_know_the_others(backend: GpuBackend) -> None:
    logits = rows_of("plain", 700)
    draws = [
        (row, 0.9, k, p, 0.0, u) for row in range(6) for k, p, u in ((-1, 1.0, 0.3), (40, 0.9, 0.77), (-1, 0.5, 0.1))
    ]
    together = drawn(backend, logits, draws)
    assert [drawn(backend, logits[draw[0] : draw[0] + 1], [(0, *draw[1:])])[0] for draw in draws[::4]] == together[::4]


def logprobs(ops: Backend, logits: torch.Tensor, rows: list[int], tops: list[int], ids: list[list[int]]) -> Logprobs:
    return ops.logprobs(
        logits,
        np.array(rows, np.int64),
        np.array([0.3 + row / 3 for row in range(len(rows))], np.float64),
        np.array([row % logits.shape[1] for row in rows], np.int64),
        np.array(tops, np.int64),
        np.array([len(some) for some in ids], np.int64),
        np.array([token for some in ids for token in some], np.int64),
    )


@pytest.mark.parametrize("width", WIDTHS)
@KINDS
def test_logprobs(backend: GpuBackend, kind: str, width: int) -> None:
    logits, rows = rows_of(kind, width), [3, 0, 0, 5, 1, 2, 4]
    tops = [min(width, top) for top in (0, 3, 40, 1, 2, 5, 0)]
    ids = [[0], [], [width - 1, 0], [width // 2], [0], [], [0, 0, 0]]
    found, expected = (logprobs(ops, logits, rows, tops, ids) for ops in (backend, REFERENCE))
    np.testing.assert_array_equal(found.top_ids, expected.top_ids)
    for name in ("tokens", "tops", "ids"):
        values, wanted = getattr(found, name), getattr(expected, name)
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, wanted, rtol=2e-6, atol=2e-6, equal_nan=True)


def test_wrong_arguments_are_refused(backend: GpuBackend) -> None:
    logits = torch.zeros(2, 8)
    for row, top_k in ((2, 1), (-1, 1), (0, 0), (0, -2)):
        with pytest.raises((IndexError, ValueError)):
            drawn(backend, logits, [(row, 1.0, top_k, 1.0, 0.0, 0.5)])
    for rows, tops, ids in (([2], [0], [[]]), ([0], [9], [[]]), ([0], [-1], [[]]), ([0], [0], [[8]])):
        with pytest.raises(IndexError):
            logprobs(backend, logits, rows, tops, ids)
    for wrong in (torch.zeros(8, 2).T, torch.zeros(2, 8, dtype=torch.float64)):
        with pytest.raises(ValueError, match="float32"):
            backend.best(wrong)
    assert backend.best(logits.to(F32))[0].tolist() == [0, 0]
