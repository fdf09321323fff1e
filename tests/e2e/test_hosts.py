"""One model on two machines, which are two launchers here, that find each other at an address of the loopback."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from kills import pid_of
from tiny_models import tiny_llama, tiny_qwen2_moe

from engine.bench.live_server import LiveServer, running_server

PROMPTS = [[5, 9, 13, 7], [40, 41, 42, 43, 44, 45], [7] * 30]
FLAGS = ("--dtype", "float32", "--max-total-tokens", "2048", "--cpu-threads", "1", "--skip-tokenizer-init")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def second_machine(model: Path, flags: tuple[str, ...], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "engine", "serve", str(model), *flags, "--node-rank", "1"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    family = [process.pid]
    try:
        yield process
        family += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait(20)
    assert not [pid for pid in family if psutil.pid_exists(pid)], "a process is left"


@contextmanager
def two_machines(model: Path, folder: Path) -> Iterator[tuple[LiveServer, psutil.Process, Path]]:
    """Machine 0, and the launcher and the log of machine 1."""
    shared = (*FLAGS, "--tp-size", "2", "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{free_port()}")
    log = folder / "machine1.log"
    with second_machine(model, shared, log) as second, running_server(*shared, model=model) as server:
        yield server, psutil.Process(second.pid), log


def answers(server: LiveServer) -> Any:
    body = {
        "input_ids": PROMPTS,
        "sampling_params": [
            {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True},
            {"temperature": 0.8, "sampling_seed": 5, "max_new_tokens": 12, "ignore_eos": True},
            {"temperature": 1.1, "top_k": 7, "sampling_seed": 6, "max_new_tokens": 12, "ignore_eos": True},
        ],
    }
    found = httpx.post(f"{server.url}/generate", json=body, timeout=120)
    assert found.status_code == 200, found.text
    return [one["output_ids"] for one in found.json()]


@pytest.fixture(
    scope="module",
    params=[pytest.param(tiny_llama, id="dense"), pytest.param(tiny_qwen2_moe, id="experts", marks=pytest.mark.slow)],
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = request.param(tmp_path_factory.mktemp("hosts") / "model")
    return path


def test_two_machines_answer_like_one_and_survive_each_other(model: Path, tmp_path: Path) -> None:
    with running_server(*FLAGS, model=model) as alone:
        wanted = answers(alone)
    with two_machines(model, tmp_path) as (server, machine, log):
        assert answers(server) == wanted
        assert "computes scheduler tp1 for 127.0.0.1:" in log.read_text()
        next(one for one in machine.children() if "scheduler tp1" in " ".join(one.cmdline())).kill()
        assert answers(server) == wanted, "after the death of the other machine's rank"
        psutil.Process(pid_of(server, "scheduler")).send_signal(signal.SIGKILL)
        assert answers(server) == wanted, "after the death of rank 0"
        until = time.monotonic() + 60
        while httpx.get(f"{server.url}/health", timeout=10).status_code != 200:
            assert time.monotonic() < until
            time.sleep(0.1)


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    def refused(*flags: str) -> str:
        command = [sys.executable, "-m", "engine", "serve", str(tmp_path), *flags]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert found.returncode == 2
        return found.stderr

    assert "argument --node-rank: 2: of 2 machines, 0 to 1" in refused(
        "--nnodes", "2", "--node-rank", "2", "--tp-size", "2", "--dist-init-addr", "a:1"
    )
    assert "argument --nnodes: 2: --tp-size is 3, and each machine has as many ranks" in refused(
        "--nnodes", "2", "--tp-size", "3", "--dist-init-addr", "a:1"
    )
    for address in ("", "nowhere", "host:0", "host:70000"):
        found = refused("--nnodes", "2", "--tp-size", "2", *(["--dist-init-addr", address] if address else []))
        assert "several machines need HOST:PORT of machine 0" in found, address
