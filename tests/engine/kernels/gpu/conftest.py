"""Where the kernels run: in Triton's interpreter on the CPU, or with `-m gpu` on a GPU. A process does either.

The interpreter is chosen by an environment variable, as triton and then the kernels are imported. It is taken back at
once: the servers that other tests start must not inherit it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Iterator

import pytest
import torch

VARIABLE = "TRITON_INTERPRET"

if importlib.util.find_spec("triton") is None:  # there are no builds of it but for Linux
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "gpu" or importlib.util.find_spec("triton") is None:
        return
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    device = importlib.import_module("engine.kernels.gpu.device")
    for module in pkgutil.iter_modules(device.__path__):
        importlib.import_module(f"{device.__name__}.{module.name}")
    interpreter = importlib.import_module("interpreter")
    interpreter.hasten()
    interpreter.repair()
    if before is None:
        del os.environ[VARIABLE]


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    if (request.param == "cuda") != (request.config.option.markexpr == "gpu"):
        pytest.skip("this process runs the kernels elsewhere")
    return torch.device(request.param)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
