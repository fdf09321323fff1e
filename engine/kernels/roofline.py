"""What this machine can do at most: reading memory, and multiplying matrices."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_READ_BYTES = 512 << 20
_SIZE = 1024
_TRIES = 5


@dataclass(frozen=True)
class Roofline:
    """read_bandwidth: bytes a second. matmul: FLOP a second, by the name of the dtype."""

    threads: int
    isa: str
    read_bandwidth: float
    matmul: dict[str, float]


def measure_roofline(threads: int) -> Roofline:
    """The best of some tries each, on `threads` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        data = torch.ones(_READ_BYTES // 4, dtype=torch.float32)
        bandwidth = _READ_BYTES / _least_seconds(data.sum)
        del data
        matmul = {str(dtype).removeprefix("torch."): _matmul(dtype) for dtype in (torch.bfloat16, torch.float32)}
        return Roofline(threads, torch.backends.cpu.get_cpu_capability().lower(), bandwidth, matmul)
    finally:
        torch.set_num_threads(before)


def _matmul(dtype: torch.dtype) -> float:
    left, right = (torch.randn(_SIZE, _SIZE).to(dtype) for _ in range(2))
    return float(2 * _SIZE**3 / _least_seconds(lambda: torch.mm(left, right)))


def _least_seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(_TRIES):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
