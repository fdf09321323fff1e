"""A pytest plugin, for `-p other_kernels --kernels FILE`: tests run on the extension in FILE, not the installed one."""

from __future__ import annotations

import importlib.util
import sys

import pytest

NAME = "engine.kernels._cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernels", required=True, help="the extension _cpu to test")


def pytest_configure(config: pytest.Config) -> None:
    import engine.kernels

    assert NAME not in sys.modules, "the installed kernels were imported before"
    spec = importlib.util.spec_from_file_location(NAME, config.getoption("--kernels"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = engine.kernels._cpu = module  # type: ignore[attr-defined]
    spec.loader.exec_module(module)
