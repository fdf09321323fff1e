"""What --device auto means on machines that are not this one."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path

import pytest
from tiny_models import tiny_llama

from engine.config import ServerConfig
from engine.launcher import device
from engine.launcher.resolve import resolve

BUILDS = {
    "cuda: Optional[str] = '12.8'\n": True,
    "cuda: Optional[str] = None\n": False,
    "cuda = '13.0'": True,
    "": False,
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with everything: remove what it is not to have."""
    for node in ("nvidiactl", "nvidia0", "nvidia1", "nvidia-uvm", "nvidia-caps"):
        (tmp_path / node).touch()
    (tmp_path / "version.py").write_text("__version__ = '2.13.0'\ncuda: Optional[str] = '12.8'\n")
    (tmp_path / "triton").touch()
    monkeypatch.setattr(device, "_DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def found(name: str) -> importlib.machinery.ModuleSpec | None:
        if name == "triton" and not (tmp_path / "triton").exists():
            return None
        return importlib.machinery.ModuleSpec(name, None, origin=str(tmp_path / "__init__.py"))

    monkeypatch.setattr(importlib.util, "find_spec", found)
    return tmp_path


def test_auto_is_the_gpu_where_everything_for_one_is_there(machine: Path) -> None:
    assert device.served_device("auto", 1) == "cuda"
    assert device.served_device("cpu", 1) == "cpu"


def test_auto_gives_each_rank_a_gpu_or_none(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for first in range(4):
        for ranks in range(1, 4):
            assert device.served_device("auto", ranks, first) == ("cuda" if first + ranks <= 2 else "cpu")
    assert device.served_device("cuda", 3) == "cuda"  # what was asked for is not second-guessed
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert (device.served_device("auto", 1), device.served_device("auto", 2)) == ("cuda", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Made before `machine` changes what can be imported."""
    return str(tiny_llama(tmp_path_factory.mktemp("model") / "model"))


def test_each_machine_counts_for_its_own_ranks(model: str, machine: Path) -> None:
    for nodes, first, wanted in ((2, 0, "cuda"), (1, 0, "cpu"), (2, 1, "cpu"), (4, 1, "cuda")):
        config = ServerConfig(
            model_path=model, skip_tokenizer_init=True, tp_size=4, nnodes=nodes, base_gpu_id=first,
            dist_init_addr="127.0.0.1:5000",
        )  # fmt: skip
        assert resolve(config).server.device == wanted, (nodes, first)


VISIBLE = {None: 2, "": 0, "-1": 0, "0": 1, "1,0": 2, "0,-1,1": 1, "GPU-8932f937": 1, "0,1,2": 2, "0, ,1": 1}


@pytest.mark.parametrize(("visible", "count"), VISIBLE.items())
def test_gpus_are_counted(machine: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device.gpu_count() == count


def test_a_driver_without_nodes_is_one_gpu(machine: Path) -> None:
    for node in ("nvidia0", "nvidia1"):
        (machine / node).unlink()
    assert device.gpu_count() == 1
    (machine / "nvidiactl").rename(machine / "dxg")
    assert device.gpu_count() == 1
    (machine / "dxg").unlink()
    assert device.gpu_count() == 0
    assert device.served_device("auto", 1) == "cpu"


@pytest.mark.parametrize("missing", ["version.py", "triton"])
def test_auto_is_the_cpu_where_something_is_missing(machine: Path, missing: str) -> None:
    (machine / missing).unlink()
    assert device.served_device("auto", 1) == "cpu"
    assert device.served_device("cuda", 1) == "cuda"


@pytest.mark.parametrize(("build", "cuda"), BUILDS.items())
def test_the_build_of_torch_is_read_from_its_version(machine: Path, build: str, cuda: bool) -> None:
    (machine / "version.py").write_text("__version__ = '2.13.0'\nhip: Optional[str] = '6.1'\n" + build)
    assert device.served_device("auto", 1) == ("cuda" if cuda else "cpu")
