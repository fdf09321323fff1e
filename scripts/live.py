"""Starting a server for a benchmark, and asking it things with as little client work as possible."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
START_TIMEOUT = 120.0


@dataclass(frozen=True)
class Server:
    """A server that is ready: its address, the launcher's pid, and seconds from start to the first 200 of /health."""

    host: str
    port: int
    pid: int
    ready_seconds: float

    def processes(self) -> dict[str, psutil.Process]:
        """The children of the launcher by their titles (`frontend`, `tokenizer`, `scheduler tp0`, `detokenizer`)."""
        children = psutil.Process(self.pid).children()
        return {child.cmdline()[0].removeprefix("tokenmill: "): child for child in children}

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.host}:{self.port}{path}", timeout=30) as answer:
            return json.loads(answer.read() or b"null")

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"http://{self.host}:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            text = answer.read()
        return json.loads(text) if answer.headers.get_content_type() == "application/json" else text.decode()


@contextmanager
def serving(*flags: str, port: int = 30_000) -> Iterator[Server]:
    """Start `tokenmill serve` with `flags`, wait until /health is 200, and end it afterwards."""
    command = [sys.executable, "-m", "engine", "serve", "--port", str(port), "--log-level", "warning", *flags]
    started = time.monotonic()
    launcher = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    try:
        yield Server("127.0.0.1", port, launcher.pid, _ready(launcher, port) - started)
    finally:
        if launcher.poll() is None:
            os.kill(launcher.pid, signal.SIGTERM)
        launcher.wait(60)


def _ready(launcher: subprocess.Popen[bytes], port: int) -> float:
    """Monotonic time of the first 200 of /health."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if launcher.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {launcher.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return time.monotonic()
        except OSError:
            time.sleep(0.02)  # nothing to wait on: the port may not be open yet
    raise RuntimeError(f"not ready within {START_TIMEOUT} s")


async def stream(server: Server, body: dict[str, Any]) -> int:
    """One streamed /generate call over a raw socket; returns the bytes of its answer."""
    payload = json.dumps(body | {"stream": True}).encode()
    reader, writer = await asyncio.open_connection(server.host, server.port, limit=1 << 22)
    head = f"POST /generate HTTP/1.1\r\nHost: {server.host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
    received = 0
    tail = b""
    while data := await reader.read(1 << 16):
        received += len(data)
        tail = (tail + data)[-64:]
    writer.close()
    if b"[DONE]" not in tail:
        raise RuntimeError(f"the stream broke off: {tail!r}")
    return received
