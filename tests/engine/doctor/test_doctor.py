"""Every check over a machine that is made up, and all of them over this one."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_llama

from engine.cli import main
from engine.config import ServerConfig
from engine.doctor import kernels, machine, model, place, run, software
from engine.doctor.finding import Finding
from engine.doctor.model import Have, Needs, memory
from engine.doctor.software import Torch

GB = 10**9
PLENTY = Have(total=16 * GB, available=12 * GB)
CPU_TORCH = Torch("2.5.1+cpu", None, 1.25)


def cpuinfo(flags: str) -> str:
    return f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: {flags}\n"


AVX2 = "fpu avx2 fma f16c"
AVX512 = f"{AVX2} avx512f avx512bw avx512dq avx512vl"


@pytest.mark.parametrize(
    ("flags", "level", "isas"),
    [
        ("fpu sse2", "warning", "no AVX2"),
        ("fpu avx2", "warning", "no AVX2"),  # without FMA
        (AVX2, "ok", "Some CPU: avx2"),
        (AVX512, "ok", "Some CPU: avx512, avx2"),
        (f"{AVX512} avx512_bf16 amx_tile amx_bf16", "ok", "Some CPU: amx, avx512bf16, avx512, avx2"),
        (f"{AVX2} amx_tile amx_bf16", "ok", "Some CPU: avx2"),
    ],
)
def test_processors(flags: str, level: str, isas: str) -> None:
    finding = machine.processor(cpuinfo(flags), "x86_64")
    assert finding.level == level and isas in finding.message and bool(finding.advice) == (level != "ok")
    assert machine.processor(cpuinfo(flags), "aarch64").level == "warning"


def test_threads() -> None:
    assert machine.threads(None, 4, 8, None, None).level == "ok"
    assert machine.threads(8, 4, 8, None, None).level == "ok"
    assert machine.threads(9, 4, 8, None, None).level == "warning"
    assert machine.threads(4, 2, 8, 1.5, None).level == "warning"
    unseen = machine.threads(None, 4, 8, None, 2.5)
    assert unseen.level == "warning" and unseen.advice == "give --cpu-threads 2"


def test_the_system() -> None:
    assert machine.huge_pages("always [madvise] never\n").level == "ok"
    assert machine.huge_pages("always madvise [never]\n").level == "warning"
    assert machine.huge_pages(None).level == "ok"
    assert machine.overcommit("2\n").level == "warning"
    assert machine.overcommit("0\n").level == machine.overcommit(None).level == "ok"
    assert machine.open_files(65536).level == "ok"
    assert machine.open_files(1024).level == "warning" and "LimitNOFILE" in machine.open_files(1024).advice
    assert machine.open_files(64).level == "error"
    assert machine.clock(1000.0, 1030.0).level == "ok"
    assert machine.clock(1000.0, 2000.0).level == "warning"
    assert machine.text_encoding("utf-8", "UTF-8").level == "ok"
    assert machine.text_encoding("utf-8", "ANSI_X3.4-1968").level == "warning"
    assert machine.shared_memory(None, False).level == "warning"
    assert machine.shared_memory(GB, True).level == "ok"


def test_cgroups_of_version_1() -> None:
    text = "9:name=systemd:/\n4:memory:/box/7\n2:cpu,cpuacct:/\n0::/\n"
    assert machine.cgroup_v1(text, "memory") == "/sys/fs/cgroup/memory/box/7"
    assert machine.cgroup_v1(text, "cpu") == "/sys/fs/cgroup/cpu,cpuacct"
    assert machine.cgroup_v1("0::/user.slice\n", "cpu") is None
    assert machine.cgroup_v1(None, "cpu") is None
    assert machine.quota_v1("-1\n", "100000\n") is None
    assert machine.quota_v1("150000\n", "100000\n") == 1.5
    assert machine.quota_v1(None, None) is None
    assert machine.limit_v1("9223372036854771712\n") is None
    assert machine.limit_v1("4096\n") == 4096


def test_software() -> None:
    assert software.python((3, 10, 4), "/bin/python").level == "error"
    assert software.python((3, 11, 0, "final"), "/bin/python") == Finding("python", "ok", "3.11.0 at /bin/python")
    assert software.judge_torch(CPU_TORCH).message == "2.5.1+cpu, CPU build; imported in 1.2 s"
    assert software.judge_torch(Torch("2.8.0", "12.8", 2)).message == "2.8.0, build for CUDA 12.8; imported in 2.0 s"
    assert software.judge_torch(Torch("2.5.1", None, 11)).level == "warning"
    assert software.judge_torch("ImportError: libgomp").level == "error"


def test_torch_is_looked_at_in_a_process_of_its_own() -> None:
    found = software.look_at_torch()
    assert isinstance(found, Torch) and found.seconds > 0
    import torch

    assert (found.release, found.cuda) == (torch.__version__, torch.version.cuda)
    assert len(found.gpus) == torch.cuda.device_count()


@pytest.mark.parametrize(
    ("needs", "have", "level", "advice"),
    [
        (Needs(GB, 1000, 4096, None), PLENTY, "ok", ""),
        (Needs(15 * GB, 1000, 4096, None), PLENTY, "error", "serve a smaller model"),
        (Needs(5 * GB, 1000, 4096, None), Have(16 * GB, 4 * GB), "error", "end other programs or raise the cgroup's"),
        (Needs(8 * GB, 10**6, 4096, None), PLENTY, "warning", "give --context-length 2000"),
        (Needs(8 * GB, 10**6, 4096, 5000), PLENTY, "error", "--max-total-tokens 5000: at most 4000 fit"),
        (Needs(8 * GB, 10**6, 4096, 3000), PLENTY, "ok", ""),
        (Needs(3 * GB, 1000, 4096, None), Have(16 * GB, 12 * GB, 2 * GB), "error", "raise its limit"),
    ],
)
def test_memory(needs: Needs, have: Have, level: str, advice: str) -> None:
    finding = memory(needs, have)
    assert finding.level == level and finding.advice.startswith(advice) and bool(finding.advice) == bool(advice)


def test_a_port_and_who_can_reach_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = place.port(ServerConfig(port=other.getsockname()[1]))
    assert taken.level == "error" and "is in use" in taken.message
    assert place.port(ServerConfig(port=0)).level == "ok"
    assert place.port(ServerConfig(port=0, host="0.0.0.0")).level == "warning"
    assert place.port(ServerConfig(port=0, host="0.0.0.0", api_key="k")).level == "ok"
    assert place.port(ServerConfig(port=0, host="192.0.2.1")).level == "error"


def test_the_folder_for_sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert place.sockets_folder(os.environ).message == f"sockets lie in {tmp_path}"
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    finding = place.sockets_folder(os.environ)
    assert finding.level == "warning" and "too long for a socket's (107 bytes)" in finding.message
    assert not list(long.iterdir())


def test_kernels_are_held_to_the_reference() -> None:
    assert kernels.kernels(ServerConfig(cpu_threads=1)).level == "ok"
    assert kernels.kernels(ServerConfig(cpu_isa="reference", cpu_threads=1)).level == "warning"
    for furthest in (float("nan"), 0.1):
        assert kernels.judge("cpu", furthest).level == "error"


def of_model(path: Path | str, have: Have = PLENTY, **settings: object) -> dict[str, Finding]:
    config = ServerConfig(model_path=str(path), skip_tokenizer_init=True, **settings)  # type: ignore[arg-type]
    return {finding.check: finding for finding in model.model(config, have)}


def test_a_model_that_is_whole_and_one_that_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_llama(tmp_path / "model")
    whole = of_model(path)
    assert [finding.level for finding in whole.values()] == ["ok"] * 4, whole
    assert whole["weights"].message.endswith("no tensor is missing")
    small = of_model(path, Have(16 * GB, 1000))
    assert small["memory"].level == "error"
    weights = path / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-100])
    assert of_model(path)["weights"].level == "error"
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    gone = next(name for name in header if name.endswith("q_proj.weight"))
    header["of_another_model"] = header.pop(gone)
    encoded = json.dumps(header).encode()
    weights.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])
    damaged = of_model(path)["weights"]
    assert damaged.level == "error" and gone in damaged.message
    (path / "config.json").unlink()
    assert of_model(path)["model"].level == "error"
    assert of_model(path, context_length=0)["model"].level == "error"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    missing = of_model("nobody/has-this", download_dir=str(tmp_path / "cache"))["model"]
    assert missing.level == "warning" and "hf download nobody/has-this" in missing.advice


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "model")
    config = ServerConfig(model_path=str(path), tokenizer_path=str(tmp_path))
    (finding,) = model.model(config, PLENTY)
    assert finding.level == "error" and "tokenizer.json" in finding.message


def test_a_check_that_fails_is_a_finding() -> None:
    (finding,) = run._guarded("clock", lambda: [Finding("clock", "ok", str(1 / 0))])
    assert finding.level == "error" and "ZeroDivisionError" in finding.message


def test_an_error_is_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(software, "look_at_torch", lambda: CPU_TORCH)
    words = ["--port", "0", "--cpu-threads", "1", "--skip-tokenizer-init"]
    assert main(["doctor", str(tiny_llama(tmp_path / "model")), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("0 errors, ") and all(line.split()[0] in ("ok", "warning") for line in lines[:-1])
    assert main(["doctor", "--json", "--model-path", str(tmp_path / "none"), *words]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["counts"]["error"] == 1
    (error,) = [finding for finding in report["findings"] if finding["level"] == "error"]
    assert error["check"] == "model" and error["advice"]
    with pytest.raises(SystemExit) as refused:
        main(["doctor", "--port", "x"])
    assert refused.value.code == 2
    with pytest.raises(SystemExit) as helped:
        main(["doctor", "--help"])
    assert helped.value.code == 0


def test_this_machine_and_the_bundled_model() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "engine", "doctor", "--json", "--port", "0"], capture_output=True, text=True, check=False
    )
    report = json.loads(done.stdout)
    errors = [finding for finding in report["findings"] if finding["level"] == "error"]
    assert done.returncode == 0 and not errors, errors
    checks = [finding["check"] for finding in report["findings"]]
    assert {"python", "torch", "device", "kernels", "model", "tokenizer", "weights", "memory", "port"} <= set(checks)
