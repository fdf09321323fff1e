"""Teams of threads: whoever comes late or not at all, a plan's numbers are the same."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from backends import ISAS
from plans import BF16, F32, buffer, packed, padded_vector, random, read, run

from engine.kernels import _cpu
from engine.kernels.packed import PackedMatrix


class Chain:
    """A plan of short ops: a stream, and `length` times a norm of it and a product that is added to it."""

    def __init__(self, team: _cpu.Team, isa: str, matrix: PackedMatrix, length: int) -> None:
        self.plan = _cpu.Plan(team, isa)
        self.width = matrix.inputs
        self.scale = padded_vector(torch.ones(self.width))
        self.stream, self.normed = buffer(self.plan, self.width), buffer(self.plan, self.width, BF16)
        for _ in range(length):
            self.plan.norm(self.stream, self.scale.data_ptr(), 1e-5, self.normed, False)
            self.plan.linear(self.normed, matrix.packed, self.stream, "add", False)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        self.plan.write(self.stream, x.numpy())
        run(self.plan, len(x))
        return read(self.plan, self.stream, len(x))


@pytest.fixture(scope="module")
def matrix() -> PackedMatrix:
    return packed(random(1, 48, 48, dtype=BF16))


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return random(2, 40, 48)


@pytest.mark.parametrize("isa", ISAS)
def test_the_number_of_threads_changes_nothing(isa: str, matrix: PackedMatrix, rows: torch.Tensor) -> None:
    expected = Chain(_cpu.Team(1, []), isa, matrix, 9).run(rows)
    for threads in (2, 3, 5, 16):
        team = _cpu.Team(threads, [0] * threads)  # all of them on one core
        assert team.threads == threads
        chain = Chain(team, isa, matrix, 9)
        for _ in range(20):
            assert torch.equal(chain.run(rows), expected)


def test_thousands_of_short_plans_with_late_threads(matrix: PackedMatrix, rows: torch.Tensor) -> None:
    """More threads than cores, plans of different lengths in turn: threads come late, some by several plans."""
    team, alone = _cpu.Team(4, []), _cpu.Team(1, [])
    lengths = (1, 2, 7, 3, 12, 1, 25)
    sizes = (1, 40, 9)
    chains = [Chain(team, ISAS[0], matrix, length) for length in lengths]
    expected = {
        (length, size): Chain(alone, ISAS[0], matrix, length).run(rows[:size]) for length in lengths for size in sizes
    }
    for turn in range(20_000):
        size, chain = sizes[turn % 3], turn % len(chains)
        assert torch.equal(chains[chain].run(rows[:size]), expected[lengths[chain], size]), f"turn {turn}"


def test_teams_work_side_by_side(matrix: PackedMatrix, rows: torch.Tensor) -> None:
    """Each has a thread of Python's to itself, and is started and ended again and again."""
    expected = Chain(_cpu.Team(1, []), ISAS[0], matrix, 5).run(rows)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(10):
            chain = Chain(_cpu.Team(2, []), ISAS[0], matrix, 5)
            wrong.extend(number for _ in range(20) if not torch.equal(chain.run(rows), expected))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_plans_of_one_team_take_turns(matrix: PackedMatrix, rows: torch.Tensor) -> None:
    team = _cpu.Team(2, [])
    chains = {isa: Chain(team, isa, matrix, 4) for isa in ISAS}
    expected = {isa: chain.run(rows) for isa, chain in chains.items()}
    for _ in range(50):
        for isa, chain in chains.items():
            assert torch.equal(chain.run(rows), expected[isa])


def test_a_plan_keeps_what_it_works_with(rows: torch.Tensor) -> None:
    """Its team and its matrices may be dropped by everyone else."""
    plan = _cpu.Plan(_cpu.Team(2, []), ISAS[0])
    x, out = buffer(plan, 48, F32, rows), buffer(plan, 7)
    weight = random(3, 7, 48)
    plan.linear(x, packed(weight).packed, out, "store", False)
    ballast = [packed(torch.zeros(7, 48)) for _ in range(20)]
    run(plan, len(rows))
    assert np.allclose(plan.read(out, len(rows)), rows @ weight.T, atol=1e-4)
    assert len(ballast) == 20


def test_profiles_name_the_ops(matrix: PackedMatrix, rows: torch.Tensor) -> None:
    chain = Chain(_cpu.Team(2, []), ISAS[0], matrix, 3)
    expected = chain.run(rows)
    assert chain.plan.take_profile() == {}
    chain.plan.set_profiling(True)
    assert torch.equal(chain.run(rows), expected)
    profile = chain.plan.take_profile()
    assert set(profile) == {"norm", "linear"} and min(profile.values()) > 0
    assert chain.plan.take_profile() == {}
