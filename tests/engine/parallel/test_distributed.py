"""Processes as a group over torch.distributed; gloo stands in for NCCL."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.distributed import FileStore, HashStore

from engine.parallel.distributed import DistributedGroup, open_distributed
from engine.parallel.group import GroupLostError, in_order

ROOT = Path(__file__).resolve().parents[3]
SHAPES = ((1,), (3, 48), (7, 1030), (0, 5))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def told(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What a rank says; sums of such depend on their order."""
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(shape, generator=generator) * 10.0**rank).to(dtype)


def uneven(rank: int) -> list[torch.Tensor]:
    """Of ranks' own shapes and dtypes; some have nothing."""
    return [told(rank, (2, rank + 1), DTYPES[rank]), torch.arange(rank), torch.empty(0, 3), torch.tensor(rank)]


def work(rank: int, size: int, path: str, dies: bool) -> None:
    """A rank's process: checks what it is told, or leaves rank 1 alone in the middle and sees that it is lost."""
    torch.set_num_threads(1)
    store = FileStore(path, size)
    group = open_distributed(rank, size, store, "gloo", 3.0 if dies else 30.0)
    assert (group.rank, group.size) == (rank, size)
    if dies:
        lose(group, rank)
        return
    for shape in SHAPES:
        for dtype in DTYPES:
            found = group.all_reduce(told(rank, shape, dtype))
            wanted = in_order([told(other, shape, dtype) for other in range(size)])
            assert found.dtype == dtype
            assert torch.equal(found, wanted)
    for number, mine in enumerate(uneven(rank)):
        gathered = group.gather(mine)
        assert (gathered is None) == (rank > 0)
        for other, part in enumerate(gathered or []):
            said = uneven(other)[number]
            assert part.dtype == said.dtype
            assert torch.equal(part, said)
    assert not torch.distributed.is_initialized()
    group.all_reduce(torch.ones(1))
    print("done", flush=True)
    sys.stdin.readline()  # until all are: what a rank that ends takes with it is another test
    group.close()


def lose(group: DistributedGroup, rank: int) -> None:
    if rank == 1:
        print("left", flush=True)
        os._exit(0)
    for _ in range(2):  # it stays lost
        with pytest.raises(GroupLostError, match=f"rank {rank} of"):
            group.all_reduce(torch.ones(4))
    with pytest.raises(GroupLostError):
        group.gather(torch.ones(4))
    print("lost", flush=True)
    sys.stdin.readline()


@contextmanager
def processes(size: int, path: Path, *, dies: bool = False) -> Iterator[list[subprocess.Popen[str]]]:
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(size), str(path), str(int(dies))],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    """The one line of a rank; what it has to complain about where there is none."""
    assert process.stdout is not None and process.stderr is not None
    return process.stdout.readline().strip() or process.stderr.read()[-2000:]


@pytest.mark.parametrize("size", [2, 3])
def test_sums_and_gathers(size: int, tmp_path: Path) -> None:
    with processes(size, tmp_path / "store") as ranks:
        assert [said(one) for one in ranks] == ["done"] * size
        for one in ranks:
            assert one.stdin is not None
            one.stdin.write("\n")
            one.stdin.flush()
        assert [one.wait(30) for one in ranks] == [0] * size


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_that_is_gone(size: int, tmp_path: Path) -> None:
    with processes(size, tmp_path / "store", dies=True) as ranks:
        assert [said(one) for one in ranks] == ["lost", "left", "lost"][:size]


def test_a_rank_that_never_comes(tmp_path: Path) -> None:
    with pytest.raises(GroupLostError, match="rank 0 of 2"):
        open_distributed(0, 2, FileStore(str(tmp_path / "store"), 2), "gloo", 0.5)


def test_a_rank_that_says_nothing() -> None:
    """It is there and hangs, which only the time tells."""
    store = HashStore()
    with ThreadPoolExecutor(2) as pool:
        groups = list(pool.map(lambda rank: open_distributed(rank, 2, store, "gloo", 0.5), (0, 1)))
    for ask in (groups[0].all_reduce, groups[0].gather):
        with pytest.raises(GroupLostError, match="rank 0 of 2"):
            ask(torch.ones(4))
    for group in groups:
        group.close()


def test_what_is_not_gathered() -> None:
    alone = open_distributed(0, 1, HashStore(), "gloo", 5.0)
    with pytest.raises(ValueError, match="7 dimensions"):
        alone.gather(torch.ones([1] * 7))
    alone.close()


def test_wrong_ranks(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path / "store"), 2)
    with pytest.raises(ValueError, match="rank is 2; allowed: 0 to 1"):
        open_distributed(2, 2, store, "gloo")


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "1")
