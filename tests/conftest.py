"""Triton is imported here, before anything else does so (other conftests import transformers, which does): whether it
interprets its own functions is settled as it is imported (see tests/engine/kernels/gpu/conftest.py)."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

VARIABLE = "TRITON_INTERPRET"


def _import_interpreted() -> None:
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    importlib.import_module("triton.language")
    importlib.import_module("triton.experimental.gluon")  # else imported at the first launch, and not interpreted
    if before is None:
        del os.environ[VARIABLE]


if "gpu" not in sys.argv and importlib.util.find_spec("triton") is not None:  # `-m gpu` runs the kernels on a GPU
    _import_interpreted()
