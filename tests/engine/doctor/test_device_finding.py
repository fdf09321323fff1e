"""What the doctor says of the device, on machines that are made up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import tiny_llama

from engine.config import ServerConfig
from engine.doctor import device, run
from engine.doctor.finding import Finding
from engine.doctor.model import Have, Needs, have_on_gpus, memory
from engine.doctor.software import Gpu, Torch
from engine.launcher.device import Lack

GB = 10**9
CPU = Torch("2.8.0+cpu", None, 1.0)
H200 = Gpu("H200", 140 * GB, 150 * GB)
ONE = Torch("2.8.0", "12.8", 2.0, (H200,), nccl=True)
TWO = Torch("2.8.0", "12.8", 2.0, (H200, Gpu("H200", 100 * GB, 150 * GB)), nccl=True)
OLD = "The NVIDIA driver on your system is too old"


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Lack]]:
    """What the machine lacks: nothing, unless a test puts it in here."""
    lacking: list[Lack] = []
    monkeypatch.setattr(device, "lacks", lambda ranks, first: list(lacking))
    yield lacking


def found(config: ServerConfig, count: int, torch: Torch | str) -> Finding:
    finding = device.device(config, count, torch)
    assert finding.check == "device" and bool(finding.advice) == (finding.level != "ok")
    return finding


def test_the_cpu_is_taken_where_it_is_named_or_all_there_is(lacking: list[Lack]) -> None:
    assert found(ServerConfig(device="cpu"), 1, ONE).message == "the CPU serves, as --device cpu says"
    lacking += ["gpu", "torch"]
    finding = found(ServerConfig(), 0, CPU)
    assert finding.level == "ok"
    assert finding.message == "the CPU serves: --device auto takes a GPU for each rank, and the driver shows no GPUs"


def test_a_gpu_that_lies_idle_is_told_of_with_what_it_lacks(lacking: list[Lack]) -> None:
    lacking += ["torch", "triton"]
    finding = found(ServerConfig(), 1, CPU)
    assert finding.level == "warning" and "the driver shows 1 GPU; missing: a torch that is built" in finding.message
    assert "download.pytorch.org/whl/cu" in finding.advice and "tokenmill[gpu]" in finding.advice
    lacking[:] = ["gpu"]
    finding = found(ServerConfig(tp_size=2), 1, ONE)
    assert finding.level == "warning" and finding.message.endswith("missing: a GPU for each rank")


def test_gpus_that_are_asked_for_and_cannot_be_had_are_an_error(lacking: list[Lack]) -> None:
    lacking += ["gpu"]
    finding = found(ServerConfig(device="cuda", base_gpu_id=3), 1, ONE)
    assert finding.level == "error" and "wants 1 GPU from number 3 on, and the driver shows 1 GPU;" in finding.message
    assert "the driver of 4 GPUs" in finding.advice and "--base-gpu-id" in finding.advice
    # Nodes can be hidden where torch finds the GPU all the same.
    assert found(ServerConfig(device="cuda"), 0, ONE).message == "--device cuda serves on 1 GPU: H200"
    lacking += ["triton"]
    finding = found(ServerConfig(device="cuda"), 0, ONE)
    assert finding.level == "error" and finding.message.endswith("missing: triton")


def test_a_driver_that_torch_cannot_use_is_an_error(lacking: list[Lack]) -> None:
    for wanted in ("auto", "cuda"):
        finding = found(ServerConfig(device=wanted), 1, Torch("2.8.0", "12.8", 2.0, warning=OLD))
        assert finding.level == "error" and "torch can use no GPUs in all: " + OLD in finding.message
        assert "CUDA 12.8" in finding.advice
        assert found(ServerConfig(device=wanted), 1, "ImportError: libcudart").level == "error"


def test_several_ranks_want_nccl(lacking: list[Lack]) -> None:
    config = ServerConfig(tp_size=2)
    assert found(config, 2, TWO).message == "--device auto serves on 2 GPUs: H200, H200"
    without = Torch("2.8.0", "12.8", 2.0, TWO.gpus, nccl=False)
    finding = found(config, 2, without)
    assert finding.level == "error" and "NCCL" in finding.message
    assert found(ServerConfig(), 2, without).level == "ok"


def test_memory_is_that_of_the_gpus() -> None:
    assert have_on_gpus(ServerConfig(tp_size=2), ONE.gpus) is None
    both = have_on_gpus(ServerConfig(tp_size=2), TWO.gpus)
    assert both == Have(300 * GB, 176 * GB, None, 1.0, " to weights and pool on 2 GPUs")
    half = have_on_gpus(ServerConfig(mem_fraction_static=0.5), ONE.gpus)
    assert half is not None and half.available == 70 * GB
    fits = memory(Needs(100 * GB, 10**6, 10**5, None), both)
    assert fits.level == "warning" and "the pool will hold 76000 tokens" in fits.message
    assert memory(Needs(60 * GB, 10**6, 10**4, None), half).level == "ok"
    assert memory(Needs(80 * GB, 10**6, 10**4, None), half).level == "error"


def test_where_gpus_serve_the_processor_is_not_looked_at(
    lacking: list[Lack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tiny_llama(tmp_path / "model")), "--port", "0", "--skip-tokenizer-init", "--device", "cuda"]
    monkeypatch.setattr(run.software, "look_at_torch", lambda: ONE)
    assert run.doctor(words) == 0
    lines = {line[9:27].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert lines["device"].endswith("--device cuda serves on 1 GPU: H200")
    assert "to weights and pool on 1 GPU" in lines["memory"]
    assert not {"processor", "kernels", "threads"} & set(lines)
