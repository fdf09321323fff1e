"""Large tensors on the host: touched only as they are used, and in huge pages where the system has them."""

from __future__ import annotations

import math
import mmap

import torch

HUGE_PAGE = 1 << 21


def host_tensor(shape: tuple[int, ...], *, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros whose pages the system hands out when they are first written.

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
