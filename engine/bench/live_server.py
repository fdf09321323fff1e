"""A server for a benchmark or a test: started as a user starts one, and always ended."""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from engine.bench.errors import BenchError
from engine.launcher.children import child_environment

START_TIMEOUT = 120.0
END_TIMEOUT = 60.0
PROCESSES = {"launcher", "frontend", "tokenizer", "scheduler tp0", "detokenizer"}

_URL = re.compile(rb"^Tokenmill serves \S+ on (https?://\S+)$", re.MULTILINE)
_PID = re.compile(rb"^  (.+): pid (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class LiveServer:
    """A server that is ready: its address, its pids by process title, and the file that its log goes to."""

    url: str
    pids: dict[str, int]
    log_path: Path
    launcher: subprocess.Popen[bytes]

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


@contextmanager
def running_server(
    *flags: str,
    model: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    start_timeout: float = START_TIMEOUT,
    program: Sequence[str] = ("-m", "engine", "serve"),
) -> Iterator[LiveServer]:
    """Serve `model` (None: the bundled default) on a free port with `flags`, and with `env` added to the environment.
    program: what Python runs.

    Raises BenchError with the log when the server does not come up within `start_timeout` seconds. When the body has
    ended without an error, so must the server on SIGTERM: with exit code 0 and none of its processes left, unless the
    body itself has ended it.
    """
    words = ["--port", "0", *(() if model is None else ("--model-path", str(model))), *flags]
    with tempfile.TemporaryDirectory(prefix="tokenmill-live-") as folder:
        log_path = Path(folder) / "log"
        with log_path.open("wb") as log:
            launcher = subprocess.Popen(
                [sys.executable, "-P", *program, *words],
                env=child_environment() | dict(env or {}), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        try:
            server = _when_ready(launcher, log_path, start_timeout)
            yield server
            if launcher.poll() is None:
                _end_and_check(server)
        finally:
            _kill_what_is_left(launcher)


def _when_ready(launcher: subprocess.Popen[bytes], log_path: Path, timeout: float) -> LiveServer:
    assert launcher.stdout is not None
    deadline = time.monotonic() + timeout
    said = b""
    with selectors.DefaultSelector() as selector:
        selector.register(launcher.stdout, selectors.EVENT_READ)
        while len(_PID.findall(said)) < len(PROCESSES):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                log = log_path.read_text(errors="replace")
                raise BenchError(f"the server was not ready within {timeout:g} s:\n{log}")
            chunk = os.read(launcher.stdout.fileno(), 1 << 16)
            if not chunk:
                code = launcher.wait(END_TIMEOUT)
                raise BenchError(f"the server ended with exit code {code}:\n{log_path.read_text(errors='replace')}")
            said += chunk
    url = _URL.search(said)
    assert url is not None, said
    return LiveServer(
        url[1].decode(), {title.decode(): int(pid) for title, pid in _PID.findall(said)}, log_path, launcher
    )


def _end_and_check(server: LiveServer) -> None:
    server.launcher.send_signal(signal.SIGTERM)
    code = server.launcher.wait(END_TIMEOUT)
    if code:
        raise BenchError(f"the server ended with exit code {code} on SIGTERM:\n{server.log()}")
    left = {title: pid for title, pid in server.pids.items() if psutil.pid_exists(pid)}
    if left:
        raise BenchError(f"processes of the server still run after its end: {left}\n{server.log()}")


def _kill_what_is_left(launcher: subprocess.Popen[bytes]) -> None:
    family = []
    if launcher.poll() is None:
        process = psutil.Process(launcher.pid)
        family = [*process.children(recursive=True), process]
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    launcher.wait()
    psutil.wait_procs(family, timeout=10)
    assert launcher.stdout is not None
    launcher.stdout.close()
