"""What this machine can do at most: reading memory, and multiplying matrices."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

_READ_BYTES = 512 << 20
_TRIES = 5
_DTYPES = {"bfloat16": 1, "float32": 0}


@dataclass(frozen=True)
class Roofline:
    """read_bandwidth: bytes a second. matmul: FLOP a second, by the name of the dtype."""

    threads: int
    isa: str
    read_bandwidth: float
    matmul: dict[str, float]


def measure_roofline(threads: int, isa: str | None = None) -> Roofline:
    """The median of some tries each, on `threads` threads, with the instructions of `isa` (None: the best there are).

    Memory is read from huge pages, far more of it than the caches hold; products are those of the kernels themselves
    on operands that stay in the first-level cache. Raises ImportError where the kernels are not installed, and
    ValueError for an ISA that this machine cannot run.
    """
    from engine.kernels import _cpu

    usable = _cpu.usable_isas()
    if isa is None and not usable:
        raise ValueError("this machine has no AVX2, which the kernels need")
    chosen = isa or usable[0]
    team = _cpu.Team(threads, [])
    bandwidth = statistics.median(_cpu.read_rate(team, _READ_BYTES) for _ in range(_TRIES))
    matmul = {
        name: statistics.median(_cpu.product_rate(team, chosen, number) for _ in range(_TRIES))
        for name, number in _DTYPES.items()
    }
    return Roofline(threads, chosen, bandwidth, matmul)
