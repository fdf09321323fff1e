"""The processor cores that this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")
_NODES = Path("/sys/devices/system/node")
_CGROUP = Path("/sys/fs/cgroup")


def physical_cores() -> list[int]:
    """One logical processor of each physical core that this process may use, at most as many as its cgroup pays for.

    Two hyperthreads share the units that the kernels keep busy: a second thread a core would only be in the way.
    """
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))
    first_of_core: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        first_of_core.setdefault(_siblings(cpu), cpu)
    cores = list(first_of_core.values())
    granted = quota()
    return cores if granted is None else cores[: max(1, math.ceil(granted))]


def share_of(
    cores: list[int], threads: int, rank: int, ranks: int, nodes: list[list[int]] | None = None
) -> tuple[list[int], int]:
    """The cores of one of several ranks, and how many of the host's `threads` it has, at least one.

    Ranks have cores of their own as long as there are enough, in a row and as far as possible of one NUMA node, so
    that what each reads lies near it. nodes: the processors of each node (None: as the system says).
    """
    nodes = numa_nodes() if nodes is None else nodes
    own_threads = max(1, threads // ranks + (rank < threads % ranks))
    placed = [[core for core in cores if core in set(node)] for node in nodes]
    placed = [node for node in placed if node] or [cores]
    if len(placed) > 1 and ranks >= len(placed):
        node = rank * len(placed) // ranks
        mates = [other for other in range(ranks) if other * len(placed) // ranks == node]
        cores, rank, ranks = placed[node], mates.index(rank), len(mates)
    else:
        cores = [core for node in placed for core in node]
    if len(cores) < ranks:
        return cores, own_threads
    small, larger = divmod(len(cores), ranks)
    start = rank * small + min(rank, larger)
    return cores[start : start + small + (rank < larger)], own_threads


def numa_nodes() -> list[list[int]]:
    """The processors of each NUMA node; empty where the system does not say."""
    found = []
    for node in sorted(_NODES.glob("node[0-9]*"), key=lambda path: int(path.name.removeprefix("node"))):
        try:
            found.append(listed((node / "cpulist").read_text()))
        except (OSError, ValueError):
            return []
    return found


def listed(text: str) -> list[int]:
    """What the kernel writes as `0-3,8`."""
    numbers: list[int] = []
    for piece in filter(None, text.strip().split(",")):
        first, _, last = piece.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _siblings(cpu: int) -> str:
    """The processors that share a core with `cpu`, as the kernel writes them."""
    try:
        return (_TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def quota() -> float | None:
    """Processors' worth of time that the cgroup of this process may use; None: no limit."""
    try:
        granted, period = (cgroup_folder() / "cpu.max").read_text().split()
        return None if granted == "max" else int(granted) / int(period)
    except (OSError, ValueError):
        return None


def cgroup_folder() -> Path:
    """Where the cgroup (v2) of this process has its files. Raises OSError where there is none."""
    line = Path("/proc/self/cgroup").read_text().partition("0::")[2]
    return _CGROUP / line.partition("\n")[0].lstrip("/")
