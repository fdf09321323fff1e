"""How ranks share the cores of a host."""

from __future__ import annotations

import pytest

from engine.kernels.cores import listed, share_of

CASES = {
    "one node": (list(range(8)), 8, 2, [list(range(8))], [([0, 1, 2, 3], 4), ([4, 5, 6, 7], 4)]),
    "nothing known": ([0, 2, 4], 3, 2, [], [([0, 2], 2), ([4], 1)]),
    "two nodes, cores by turns": ([0, 1, 2, 3], 4, 2, [[0, 2], [1, 3]], [([0, 2], 2), ([1, 3], 2)]),
    "three ranks on two nodes": (
        [0, 1, 2, 3, 4, 5], 6, 3, [[0, 1, 2], [3, 4, 5]], [([0, 1], 2), ([2], 2), ([3, 4, 5], 2)]
    ),
    "fewer ranks than nodes": ([0, 1, 2, 3], 4, 2, [[0], [1], [2], [3]], [([0, 1], 2), ([2, 3], 2)]),
    "fewer threads than cores": ([0, 1, 2, 3], 2, 2, [[0, 1, 2, 3]], [([0, 1], 1), ([2, 3], 1)]),
    "fewer cores than ranks": ([5], 1, 3, [[5]], [([5], 1)] * 3),
    "a node that is not ours": ([4, 5], 2, 2, [[0, 1], [4, 5]], [([4], 1), ([5], 1)]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_shares(case: str) -> None:
    cores, threads, ranks, nodes, expected = CASES[case]
    assert [share_of(cores, threads, rank, ranks, nodes) for rank in range(ranks)] == expected


def test_lists_as_the_kernel_writes_them() -> None:
    assert listed("0-2,8,10-11\n") == [0, 1, 2, 8, 10, 11]
    assert listed("\n") == []
