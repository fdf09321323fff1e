"""What --device auto means on machines that are not this one."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path

import pytest

from engine.launcher import device

BUILDS = {
    "cuda: Optional[str] = '12.8'\n": True,
    "cuda: Optional[str] = None\n": False,
    "cuda = '13.0'": True,
    "": False,
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with everything: remove what it is not to have."""
    (tmp_path / "nvidiactl").touch()
    (tmp_path / "version.py").write_text("__version__ = '2.13.0'\ncuda: Optional[str] = '12.8'\n")
    (tmp_path / "triton").touch()
    monkeypatch.setattr(device, "_NODES", (tmp_path / "nvidiactl",))

    def found(name: str) -> importlib.machinery.ModuleSpec | None:
        if name == "triton" and not (tmp_path / "triton").exists():
            return None
        return importlib.machinery.ModuleSpec(name, None, origin=str(tmp_path / "__init__.py"))

    monkeypatch.setattr(importlib.util, "find_spec", found)
    return tmp_path


def test_auto_is_the_gpu_where_everything_for_one_is_there(machine: Path) -> None:
    assert device.served_device("auto", 1) == "cuda"
    assert device.served_device("auto", 2) == "cpu"
    assert device.served_device("cpu", 1) == "cpu"


@pytest.mark.parametrize("missing", ["nvidiactl", "version.py", "triton"])
def test_auto_is_the_cpu_where_something_is_missing(machine: Path, missing: str) -> None:
    (machine / missing).unlink()
    assert device.served_device("auto", 1) == "cpu"
    assert device.served_device("cuda", 1) == "cuda"  # what was asked for is not second-guessed


@pytest.mark.parametrize(("build", "cuda"), BUILDS.items())
def test_the_build_of_torch_is_read_from_its_version(machine: Path, build: str, cuda: bool) -> None:
    (machine / "version.py").write_text("__version__ = '2.13.0'\nhip: Optional[str] = '6.1'\n" + build)
    assert device.served_device("auto", 1) == ("cuda" if cuda else "cpu")
