"""One model on two machines, which are two launchers here, that find each other at an address of the loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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


def free_port(host: str = "127.0.0.1") -> int:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def machine(
    number: int, model: Path, flags: tuple[str, ...], log: Path, within: tuple[str, ...] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """A launcher. within: the command that runs it elsewhere, by exec."""
    command = [*within, sys.executable, "-m", "engine", "serve", str(model), *flags, "--node-rank", str(number)]
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
def two_machines(
    model: Path, folder: Path, *flags: str, host: str = "127.0.0.1"
) -> Iterator[tuple[LiveServer, psutil.Process, Path]]:
    """Machine 0, and the launcher and the log of machine 1. host: where they meet."""
    meeting = f"{host}:{free_port(host.strip('[]'))}"
    shared = (*FLAGS, *flags, "--tp-size", "2", "--nnodes", "2", "--dist-init-addr", meeting)
    log = folder / "machine1.log"
    with machine(1, model, shared, log) as second, running_server(*shared, model=model) as server:
        yield server, psutil.Process(second.pid), log


def rank_of(machine: psutil.Process) -> psutil.Process:
    """The one rank that machine 1 computes now. Raises StopIteration where there is none."""
    return next(
        one
        for one in machine.children()
        if one.status() != psutil.STATUS_ZOMBIE and "scheduler tp1" in " ".join(one.cmdline())
    )


BODY = {
    "input_ids": PROMPTS,
    "sampling_params": [
        {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True},
        {"temperature": 0.8, "sampling_seed": 5, "max_new_tokens": 12, "ignore_eos": True},
        {"temperature": 1.1, "top_k": 7, "sampling_seed": 6, "max_new_tokens": 12, "ignore_eos": True},
    ],
}


def answers(server: LiveServer) -> Any:
    found = httpx.post(f"{server.url}/generate", json=BODY, timeout=120)
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
        rank_of(machine).kill()
        assert answers(server) == wanted, "after the death of the other machine's rank"
        psutil.Process(pid_of(server, "scheduler")).send_signal(signal.SIGKILL)
        assert answers(server) == wanted, "after the death of rank 0"
        until = time.monotonic() + 60
        while httpx.get(f"{server.url}/health", timeout=10).status_code != 200:
            assert time.monotonic() < until
            time.sleep(0.1)


def has_ipv6() -> bool:
    try:
        free_port("::1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_machines_that_meet_at_an_address_of_ipv6(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    with running_server(*FLAGS, model=model) as alone:
        wanted = answers(alone)
    with two_machines(model, tmp_path, host="[::1]") as (server, _, log):
        assert answers(server) == wanted
        assert "computes scheduler tp1 for [::1]:" in log.read_text()


@contextmanager
def two_namespaces(family: socket.AddressFamily) -> Iterator[tuple[str, str, str]]:
    """Two networks joined by a wire: their names, and the address of the first one."""
    tag = f"tm{os.getpid()}"
    names = f"{tag}a", f"{tag}b"
    net, bits = f"10.{os.getpid() % 200 + 20}.{os.getpid() // 200 % 250}.", "24"
    if family == socket.AF_INET6:
        net, bits = f"fd12:{os.getpid() % 9999}::", "64"

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
        if done.returncode:
            raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")

    with ExitStack() as made:
        for name in names:
            ip("netns", "add", name)
            made.callback(ip, "netns", "delete", name)  # and with it its end of the wire
        ip("link", "add", f"{tag}x", "netns", names[0], "type", "veth", "peer", "name", f"{tag}y", "netns", names[1])
        for number, name in enumerate(names):
            link, once = f"{tag}{'xy'[number]}", ["nodad"] if family == socket.AF_INET6 else []
            ip("-n", name, "address", "add", f"{net}{number + 1}/{bits}", "dev", link, *once)
            for link in (f"{tag}{'xy'[number]}", "lo"):
                ip("-n", name, "link", "set", link, "up")
        ip("netns", "exec", names[0], "true")  # may be forbidden where the rest is not
        yield *names, f"{net}1"


CLIENT = """
import sys, time, httpx
url, body = sys.argv[1:]
until = time.monotonic() + 60
while True:
    try:
        if httpx.get(url + "/health", timeout=10).status_code == 200:
            break
    except httpx.TransportError:
        pass
    assert time.monotonic() < until, "the server is not ready"
    time.sleep(0.1)
kind = {"Content-Type": "application/json"}
sys.stdout.write(httpx.post(url + "/generate", content=body, headers=kind, timeout=60).raise_for_status().text)
"""


@pytest.mark.parametrize("family", [socket.AF_INET, pytest.param(socket.AF_INET6, marks=pytest.mark.slow)])
def test_machines_with_networks_of_their_own(family: socket.AddressFamily, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    with running_server(*FLAGS, model=model) as alone:
        wanted = answers(alone)
    with ExitStack() as running:
        try:
            first, second, address = running.enter_context(two_namespaces(family))
        except OSError as error:
            pytest.skip(f"no network namespaces can be made here: {error}")
        there = f"[{address}]" if family == socket.AF_INET6 else address
        flags = (*FLAGS, "--tp-size", "2", "--nnodes", "2", "--dist-init-addr", f"{there}:29511")
        logs = [tmp_path / "machine0.log", tmp_path / "machine1.log"]
        within = [("ip", "netns", "exec", name) for name in (first, second)]
        running.enter_context(machine(1, model, flags, logs[1], within[1]))
        serving = (*flags, "--host", address, "--port", "30000")
        running.enter_context(machine(0, model, serving, logs[0], within[0]))
        client = [*within[0], sys.executable, "-c", CLIENT, f"http://{there}:30000", json.dumps(BODY)]
        found = subprocess.run(client, capture_output=True, text=True, timeout=150)
        assert found.returncode == 0, found.stderr + "".join(log.read_text() for log in logs)
        assert [one["output_ids"] for one in json.loads(found.stdout)] == wanted
        assert f"computes scheduler tp1 for {there}:" in logs[1].read_text()


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
