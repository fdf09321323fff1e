"""Which kernels serve, and on which cores."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from backends import ISAS

import engine.kernels
from engine.config import ConfigError
from engine.kernels import cores
from engine.kernels.choice import open_backend, take_gpu
from engine.kernels.cpu import CpuBackend
from engine.kernels.eager import EagerBackend


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TOKENMILL_CPU_ISA", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def isa_of(flag: str) -> str:
    backend = open_backend(flag, 1)
    return backend.isa if isinstance(backend, CpuBackend) else backend.name


def test_the_best_isa_serves_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isa_of("auto") == ISAS[0]
    assert [isa_of(name) for name in ISAS] == ISAS
    monkeypatch.setenv("TOKENMILL_CPU_ISA", ISAS[-1])
    assert isa_of("auto") == ISAS[-1]
    assert isa_of("reference") == "reference"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"--device is cuda; torch .* sees no such GPU on this machine"):
        take_gpu(0, (0, 1))


def test_each_rank_of_a_machine_takes_the_next_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    found = [take_gpu(first, (number, 2)) for first in (0, 2) for number in (0, 1)]
    assert found == taken == [torch.device("cuda", index) for index in range(4)]
    for first, place in ((3, (0, 2)), (0, (4, 5)), (4, (0, 1))):
        with pytest.raises(ConfigError, match=f"--base-gpu-id is {first}, .*{place[1]}.* wants a GPU .* 4: 0 to 3"):
            take_gpu(first, place)


def test_what_cannot_be_run_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_CPU_ISA", "sse9")
    with pytest.raises(ConfigError, match=f"'sse9'; this machine can run auto, reference, {ISAS[0]}"):
        open_backend("auto", None)


def test_without_kernels_the_reference_serves_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "engine.kernels._cpu", None)
    monkeypatch.delattr(engine.kernels, "_cpu", raising=False)
    with caplog.at_level(logging.WARNING):
        assert isinstance(open_backend("auto", 1), EagerBackend)
    assert "reference kernels" in caplog.text
    with pytest.raises(ConfigError, match="avx2: the kernels are not installed"):
        open_backend("avx2", 1)


def test_a_processor_without_avx2_is_served_by_the_reference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("engine.kernels._cpu.usable_isas", list)
    with caplog.at_level(logging.WARNING):
        assert isinstance(open_backend("auto", 1), EagerBackend)
    assert "no AVX2" in caplog.text


@pytest.mark.parametrize(
    ("siblings", "quota", "expected"),
    [
        (["0,2", "1,3", "0,2", "1,3"], "max 100000", [0, 1]),
        (["0", "1", "2", "3"], "max 100000", [0, 1, 2, 3]),
        (["0", "1", "2", "3"], "150000 100000", [0, 1]),
        (["0", "1", "2", "3"], "50000 100000", [0]),
        ([None, None], None, [0, 1]),
    ],
    ids=["hyperthreads", "cores", "a core and a half", "half a core", "nothing known"],
)
def test_one_processor_a_core_as_far_as_the_quota_goes(
    siblings: list[str | None], quota: str | None, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cpu, group in enumerate(siblings):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        if group is not None:
            (topology / "thread_siblings_list").write_text(f"{group}\n")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(cores, "_TOPOLOGY", tmp_path)
    monkeypatch.setattr(cores, "cgroup_folder", lambda: tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(len(siblings))))
    assert cores.physical_cores() == expected
