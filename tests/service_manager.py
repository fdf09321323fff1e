"""Plays systemd for one service: a notify socket, a watchdog, and a listening socket at descriptor 3."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PATIENCE = 60.0
# LISTEN_PID is the service's own, which nobody knows before it is there: systemd, too, sets it between fork and exec.
_EXEC = """
import os, sys
descriptor, *command = sys.argv[1:]
if descriptor != "-":
    os.dup2(int(descriptor), 3)
    os.set_inheritable(3, True)
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="http")
os.environ["WATCHDOG_PID"] = str(os.getpid())
os.execv(command[0], command)
"""


@dataclass
class Service:
    """process: the service's main one. told: every notification so far, in order, its fields by name."""

    process: subprocess.Popen[bytes]
    manager: socket.socket
    log: Path
    told: list[dict[str, str]] = field(default_factory=list)

    def hear(self, **fields: str) -> dict[str, str]:
        """Read on until a notification with these fields comes; returns all its fields."""
        deadline = time.monotonic() + PATIENCE
        while True:
            readable, _, _ = select.select([self.manager], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, f"{fields} was not told, but {self.told}\n{self.log.read_text()}"
            self.read()
            if self.told[-1].items() >= fields.items():
                return self.told[-1]

    def read(self) -> None:
        lines = self.manager.recv(1 << 16).decode().split("\n")
        self.told.append(dict(line.split("=", 1) for line in lines))

    def ends(self) -> int:
        """Wait for its end, and read what it still has told."""
        code = self.process.wait(PATIENCE)
        while select.select([self.manager], [], [], 0)[0]:
            self.read()
        return code

    def last(self, name: str) -> str | None:
        return next((told[name] for told in reversed(self.told) if name in told), None)


@contextmanager
def service(
    command: Sequence[str],
    folder: Path,
    *,
    listener: socket.socket | None = None,
    watchdog: float | None = None,
    abstract: bool = False,
    env: Mapping[str, str] | None = None,
) -> Iterator[Service]:
    """Run `command`, whose first word is a path, as systemd runs a unit of Type=notify, and kill what is left of it.

    folder: for the socket and the log, which another service may have had before. watchdog: WatchdogSec.
    """
    address = f"@tokenmill-test-{os.getpid()}-{time.monotonic_ns()}" if abstract else str(folder / "notify")
    (folder / "notify").unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, (folder / "log").open("ab") as log:
        manager.bind("\0" + address[1:] if abstract else address)
        environment = os.environ | dict(env or {}) | {"NOTIFY_SOCKET": address}
        if watchdog is not None:
            environment["WATCHDOG_USEC"] = str(round(watchdog * 1e6))
        inherited = [] if listener is None else [listener.fileno()]
        process = subprocess.Popen(
            [sys.executable, "-c", _EXEC, *(map(str, inherited) if inherited else "-"), *command],
            env=environment, pass_fds=inherited, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            yield Service(process, manager, folder / "log")
        finally:
            family = []
            if process.poll() is None:
                main = psutil.Process(process.pid)
                family = [main, *main.children(recursive=True)]
            for member in family:
                if member.is_running() and member.status() != psutil.STATUS_ZOMBIE:
                    member.kill()
            process.wait()
            psutil.wait_procs(family, timeout=10)
