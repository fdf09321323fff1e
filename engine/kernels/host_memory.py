"""Memory of the host: how much of it is free, and large tensors that are touched only as they are used."""

from __future__ import annotations

import math
import mmap

import psutil
import torch

from engine.kernels.cores import cgroup_folder

HUGE_PAGE = 1 << 21


def host_tensor(shape: tuple[int, ...], *, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros whose pages the system hands out when they are first written, in huge pages where it has them.

    Raises OSError where the address space cannot be had.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE_PAGE or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(shape, dtype=dtype)
    # The tensor keeps the mapping alive through the buffer that it was made from.
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + size].view(dtype).view(shape)


def available_memory() -> int:
    """Bytes that this process may still take: what the system has free, and no more than its cgroup is allowed."""
    free: int = psutil.virtual_memory().available
    try:
        folder = cgroup_folder()
        limit = (folder / "memory.max").read_text().strip()
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # Pages of files that nobody looks at are given back when memory is wanted.
        used = int((folder / "memory.current").read_text()) - int(statistics["inactive_file"])
        return free if limit == "max" else max(0, min(free, int(limit) - used))
    except (OSError, ValueError, KeyError):
        return free
