"""What ranks exchange: sums in the order of the ranks, bytes of any number, and an end where one stays away."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from thread_group import on_each, thread_groups

from engine.kernels import _cpu
from engine.kernels.exchange_group import ExchangeGroup
from engine.parallel.group import Group, GroupLostError

PART = 4096
COUNTS = st.lists(st.integers(0, 5000), min_size=3, max_size=3)


def shared(folder: Path, size: int, patience: float = 20.0) -> list[ExchangeGroup]:
    path = str(folder / f"exchange {time.monotonic_ns()}")
    return [ExchangeGroup(_cpu.SharedExchange(path, rank, size, PART, patience, rank == 0)) for rank in range(size)]


def in_order_of_ranks(groups: list[Group]) -> None:
    """(2^25 + 1) - 2^25 is 0 in float32, and 2^25 - 2^25 + 1 would be 1."""
    big = torch.tensor([2.0**25, 1.0, -(2.0**25)])
    sums = on_each(groups, lambda group: group.all_reduce(big[group.rank : group.rank + 1]).item())
    assert sums == [0.0, 0.0, 0.0]
    half = on_each(groups, lambda group: group.all_reduce(torch.full((2, 3), 0.1, dtype=torch.bfloat16)))
    assert all(torch.equal(one, half[0]) and one.shape == (2, 3) and one.dtype == torch.bfloat16 for one in half)


def test_sums_are_in_the_order_of_the_ranks(tmp_path: Path) -> None:
    in_order_of_ranks([*shared(tmp_path, 3)])
    in_order_of_ranks([*thread_groups(3)])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.lists(st.integers(0, 5000), min_size=3, max_size=3), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_any_sequence_of_calls(sizes: list[list[int]], seed: int, tmp_path: Path) -> None:
    """Sums and gathers of all sizes, larger than a part and empty ones too, however slow a rank is."""
    values = np.random.default_rng(seed).standard_normal((3, 5000)).astype(np.float32)

    def work(group: Group) -> list[list[torch.Tensor] | None]:
        mine, found = torch.from_numpy(values[group.rank]), []
        for counts in sizes:
            if group.rank == seed % 3:
                time.sleep(0.0005)
            found.append([group.all_reduce(mine[: counts[0]])])
            found.append(group.gather(mine[: counts[group.rank]].reshape(-1, 1)))
        return found

    first, *others = on_each(shared(tmp_path, 3), work)
    for number, counts in enumerate(sizes):
        total = (values[0] + values[1]) + values[2]
        for found in (first, *others):
            [own] = found[2 * number]
            assert np.array_equal(own.numpy(), total[: counts[0]])
        gathered = first[2 * number + 1]
        assert gathered is not None and all(found[2 * number + 1] is None for found in others)
        for rank, part in enumerate(gathered):
            assert np.array_equal(part.numpy()[:, 0], values[rank, : counts[rank]])


def test_a_rank_that_stays_away_ends_the_waiting(tmp_path: Path) -> None:
    present, _ = shared(tmp_path, 2, patience=0.2)
    for _ in range(2):  # it stays lost
        with pytest.raises(GroupLostError, match="rank 1 has not come"):
            present.all_reduce(torch.ones(3))


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    path = str(tmp_path / "exchange")
    with pytest.raises(OSError, match="No such file"):
        _cpu.SharedExchange(path, 1, 2, PART, 1.0, False)
    _cpu.SharedExchange(path, 0, 2, PART, 1.0, True)
    assert (tmp_path / "exchange").stat().st_mode & 0o777 == 0o600
    with pytest.raises(OSError, match="File exists"):
        _cpu.SharedExchange(path, 0, 2, PART, 1.0, True)
    with pytest.raises(OSError, match="bytes"):
        _cpu.SharedExchange(path, 1, 3, PART, 1.0, False)
    with pytest.raises(ValueError, match="rank is 2 of 2"):
        _cpu.SharedExchange(path, 2, 2, PART, 1.0, False)
    with pytest.raises(OSError, match=r"No space left|File too large|Cannot allocate|Invalid argument"):
        _cpu.SharedExchange(str(tmp_path / "large"), 0, 2, 1 << 60, 1.0, True)
    assert not (tmp_path / "large").exists()
