"""The backends that this machine can run, for tests that hold all of them to the same promise."""

from __future__ import annotations

from functools import cache

from engine.kernels import _cpu
from engine.kernels.cpu import open_cpu_backend
from engine.kernels.eager import EagerBackend
from engine.kernels.table import Backend

EMULATED = "amx-emulated"
ISAS = _cpu.usable_isas()
BFLOAT16_ISAS = [*ISAS, *([EMULATED] if "avx512bf16" in ISAS else [])]
"""AMX's kernel differs from its neighbour's only in products of bfloat16."""


@cache
def backend(name: str, threads: int = 2) -> Backend:
    """ "reference" or an ISA, with a team that all tests share."""
    return EagerBackend() if name == "reference" else open_cpu_backend(name, [], threads)
