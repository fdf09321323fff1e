"""Triton is imported here, before anything else does so: whether it interprets its own functions is settled as it is
imported (see tests/engine/kernels/gpu/conftest.py)."""

from __future__ import annotations

import importlib
import importlib.util
import os

import pytest

VARIABLE = "TRITON_INTERPRET"


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "gpu" or importlib.util.find_spec("triton") is None:
        return
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    importlib.import_module("triton.language")
    importlib.import_module("triton.experimental.gluon")  # else imported at the first launch, and not interpreted
    if before is None:
        del os.environ[VARIABLE]
