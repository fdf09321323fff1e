"""The processor cores that this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")
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
