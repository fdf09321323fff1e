"""The sampling noise: its compiled and its numpy form against the definition in plain integers."""

from __future__ import annotations

import importlib.metadata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.kernels import noise

FORMS = [noise.uniforms, noise.portable_uniforms, *([noise.compiled] if noise.compiled else [])]
SEEDS = st.integers(0, 2**64 - 1)
POSITIONS = st.integers(0, 2**40) | st.integers(-(2**63), 2**63 - 1)


def word_by_definition(seed: int, position: int) -> int:
    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    return mix((mix(seed) + (position + 1) * 0x9E3779B97F4A7C15) % 2**64)


def columns(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([seed for seed, _ in rows], np.uint64), np.array([position for _, position in rows], np.int64)


@pytest.mark.parametrize("form", FORMS)
@given(rows=st.lists(st.tuples(SEEDS, POSITIONS), max_size=20))
def test_every_form_gives_the_bits_of_the_definition(form: noise.Uniforms, rows: list[tuple[int, int]]) -> None:
    drawn = form(*columns(rows))
    assert drawn.dtype == np.float64
    assert drawn.tolist() == [(word_by_definition(seed, position) >> 11) / 2**53 for seed, position in rows]
    assert all(0.0 <= value < 1.0 for value in drawn)


def test_seed_zero_is_the_published_splitmix64_stream() -> None:
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [word_by_definition(0, position) for position in range(4)] == published


def test_strided_columns_are_read_right() -> None:
    seeds, positions = columns([(seed, 7 * seed) for seed in range(10)])
    assert np.array_equal(noise.uniforms(seeds[::2], positions[::2]), noise.uniforms(seeds, positions)[::2])


@pytest.mark.parametrize(
    ("seeds", "positions", "named"),
    [
        (np.zeros(2, np.int64), np.zeros(2, np.int64), "seeds is int64"),
        (np.zeros(2, np.uint64), np.zeros((2, 1), np.int64), "positions is int64"),
        (np.zeros(2, np.uint64), np.zeros(3, np.int64), "2 seeds for 3 positions"),
    ],
)
def test_wrong_columns_are_refused(seeds: np.ndarray, positions: np.ndarray, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        noise.uniforms(seeds, positions)


def test_the_draws_look_uniform() -> None:
    """Mean, variance and the correlation of neighbours, in seeds and in positions, within five standard errors."""
    grid = noise.uniforms(np.repeat(np.arange(300, dtype=np.uint64), 300), np.tile(np.arange(300), 300))
    count = len(grid)
    assert abs(grid.mean() - 1 / 2) < 5 * (1 / 12 / count) ** 0.5
    assert abs(grid.var() - 1 / 12) < 5 * (1 / 180 / count) ** 0.5
    centred = grid.reshape(300, 300) - 1 / 2
    for neighbours in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert abs(neighbours.mean()) < 5 / 12 / neighbours.size**0.5


def test_the_compiled_form_is_there_where_the_installation_built_it() -> None:
    try:
        wheel = importlib.metadata.distribution("tokenmill").read_text("WHEEL") or ""
    except importlib.metadata.PackageNotFoundError:
        wheel = "Root-Is-Purelib: true"  # run from a source checkout that is not installed
    assert (noise.compiled is None) == ("Root-Is-Purelib: true" in wheel)
