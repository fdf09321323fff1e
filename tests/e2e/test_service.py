"""The real server as systemd runs it: ready, its watchdog, its passed socket, its drain, and what is left of it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from service_manager import service
from test_launch import LONG, chunks

from engine.bench.live_server import LiveServer, running_server
from engine.launcher.children import child_environment

SERVE = [sys.executable, "-P", "-m", "engine", "serve", "--log-level", "info"]
CLIENTS = 8
SHORT = {"text": "The capital of France is", "sampling_params": {"max_new_tokens": 4, "temperature": 0}}


def test_a_service_from_ready_to_stopping_and_its_successor_on_the_same_socket(tmp_path: Path) -> None:
    """What connects between two servers waits in the accept queue, and is answered by the second."""
    env = child_environment() | {"XDG_RUNTIME_DIR": str(tmp_path)}
    with socket.create_server(("127.0.0.1", 0)) as listener, httpx.Client(timeout=120) as client:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        # --port is another one, and counts for nothing.
        command = [*SERVE, "--port", "1"]
        with service(command, tmp_path, listener=listener, watchdog=2.0, env=env) as first:
            ready = first.hear(READY="1")
            assert ready["STATUS"] == f"serving SmolLM2-135M-Instruct on {url}"
            before = client.post(f"{url}/generate", json=SHORT).json()
            first.hear(WATCHDOG="1")
            first.hear(WATCHDOG="1")
            begun = threading.Barrier(CLIENTS + 1)
            with ThreadPoolExecutor(CLIENTS) as clients:
                running = [clients.submit(stream_through, url, begun) for _ in range(CLIENTS)]
                begun.wait(60)
                first.process.send_signal(signal.SIGTERM)
                first.hear(STOPPING="1")
                waiting, after = ask_elsewhere(url, SHORT)
                assert [stream.result(120) for stream in running] == [150] * CLIENTS
            assert first.ends() == 0
            assert waiting.is_alive()
        with service(command, tmp_path, listener=listener, env=env) as second:
            waiting.join(60)
            assert [answer["text"] for answer in after] == [before["text"]]
            second.hear(READY="1")
            second.process.terminate()
            assert second.ends() == 0


def stream_through(url: str, begun: threading.Barrier) -> int:
    """Stream LONG to its end; returns how many tokens came."""
    with httpx.stream("POST", f"{url}/generate", json=LONG, timeout=120) as answer:
        stream = chunks(answer)
        last = next(stream)
        begun.wait(60)
        for last in stream:  # noqa: B007
            pass
    return int(last["meta_info"]["completion_tokens"])


def ask_elsewhere(url: str, body: dict[str, Any]) -> tuple[threading.Thread, list[dict[str, Any]]]:
    """Ask on a connection of its own, beside this thread; the answer comes into the list."""
    answers: list[dict[str, Any]] = []

    def ask() -> None:
        while not answers:
            answer = httpx.post(f"{url}/generate", json=body, timeout=120)
            if answer.status_code == 503:  # the signal had not reached the frontend when it accepted this
                time.sleep(0.1)
                continue
            answers.append(answer.json())

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    return thread, answers


def test_a_second_signal_under_load_ends_at_once() -> None:
    with running_server("--drain-timeout", "100") as server:
        family = [psutil.Process(pid) for pid in server.pids.values()]
        endless = {"text": "a", "stream": True, "sampling_params": {"max_new_tokens": 4000, "ignore_eos": True}}
        with httpx.stream("POST", f"{server.url}/generate", json=endless, timeout=120) as answer:
            stream = chunks(answer)
            next(stream)
            server.launcher.terminate()
            sent_again = False
            with pytest.raises(httpx.HTTPError):
                for _ in stream:
                    if not sent_again and "once more to end at once" in server.log():
                        server.launcher.terminate()
                        sent_again = True
        assert server.launcher.wait(10) == 0
        assert "SIGTERM again: ending at once" in server.log()
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive


def test_a_killed_launcher_leaves_nothing_behind_under_load() -> None:
    """No process, not even one that hangs or has just been born, and no listening port (its folder is the next launch's
    to remove: test_launcher)."""
    with running_server("--skip-server-warmup") as server:
        family = [psutil.Process(pid) for pid in server.pids.values()]
        with httpx.stream("POST", f"{server.url}/generate", json=LONG, timeout=120) as answer:
            stream = chunks(answer)
            next(stream)
            os.kill(server.pids["tokenizer"], signal.SIGSTOP)
            os.kill(server.pids["scheduler tp0"], signal.SIGKILL)
            family.append(_newborn(server))
            server.launcher.kill()
            with pytest.raises(httpx.HTTPError):
                list(stream)
        server.launcher.wait()
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health", timeout=5)


def _newborn(server: LiveServer) -> psutil.Process:
    """The first child of the launcher that was not there when the server was ready."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in psutil.Process(server.launcher.pid).children():
            if child.pid not in server.pids.values():
                return child
        time.sleep(0.001)
    raise AssertionError(server.log())
