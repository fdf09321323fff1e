"""The backends that this machine can run, for tests that hold all of them to the same promise."""

from __future__ import annotations

from functools import cache

import pytest

from engine.kernels import _cpu
from engine.kernels.cpu import open_cpu_backend
from engine.kernels.eager import EagerBackend
from engine.kernels.table import Backend

EMULATED = "amx-emulated"
ISAS = _cpu.usable_isas()
BFLOAT16_ISAS = [*ISAS, *([EMULATED] if "avx512bf16" in ISAS else [])]
"""AMX's kernel differs from its neighbour's only in products of bfloat16."""
FOR_MODELS = ["reference", *ISAS[:1], *(pytest.param(isa, marks=pytest.mark.slow) for isa in ISAS[1:])]
"""Parameters of tests of whole models: what each instruction set makes of each op is for the tests of ops to say."""


@cache
def backend(name: str, threads: int = 2) -> Backend:
    """ "reference" or an ISA, with a team that all tests share."""
    return EagerBackend() if name == "reference" else open_cpu_backend(name, [], threads)
