"""The processes of the tree: starting them, and passing on what they write."""

from __future__ import annotations

import contextlib
import os
import signal
import site
import socket
import subprocess
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import engine
from engine.config import ServerConfig
from engine.wire.struck import OWN, blocked
from engine.wire.to_worker import worker_name

TAIL_LINES = 30
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Program:
    """One process of the tree.

    name: of its inbox. title: as it is shown. module: what `python -m` runs. arguments: behind `--config FILE`.
    listens: it is given the listening socket, as `--fd N`. group: the program without which it can do nothing, nor that
    one without it: if one of them ends, all begin anew.
    """

    name: str
    title: str
    module: str
    arguments: tuple[str, ...] = ()
    listens: bool = False
    group: str = ""

    @property
    def counts_as(self) -> str:
        """Whose death its death is."""
        return self.group or self.name


PROGRAMS = (
    Program("scheduler", "scheduler tp0", "scheduler_proc", ("--rank", "0")),
    Program("tokenizer", "tokenizer", "tokenizer_proc"),
    Program("detokenizer", "detokenizer", "detokenizer_proc"),
    Program("frontend", "frontend", "http_frontend", listens=True),
)
"""In the order of starting: the slowest to load first."""


def with_workers(programs: Sequence[Program], server: ServerConfig) -> list[Program]:
    """`programs` with the scheduler's workers behind it, its ranks from 1 on; on other machines than the first, those
    of the ranks alone that are there."""
    each = server.tp_size // server.nnodes
    first = server.node_rank * each
    found = []
    for program in programs:
        if not server.node_rank:
            found.append(program)
        if program.name == "scheduler":
            for rank in range(max(first, 1), first + each):
                arguments = ("--rank", str(rank))
                found.append(
                    Program(worker_name(rank), f"scheduler tp{rank}", program.module, arguments, group=program.name)
                )
    return found


@dataclass
class Child:
    """A process that was started. Both its stdout and stderr go into `output`, a pipe read without blocking.

    started: time.monotonic() then. hung: it was killed here, since it had stopped to show signs of life.
    stopped: that was somebody else's doing.
    """

    program: Program
    process: subprocess.Popen[bytes]
    output: int
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))
    started: float = field(default_factory=time.monotonic)
    hung: bool = False
    stopped: bool = False
    _unfinished: bytes = b""

    def read(self) -> tuple[bytes, bool]:
        """The whole lines that have come (as bytes), and whether the pipe has ended."""
        chunks, ended = [self._unfinished], False
        while not ended:
            try:
                chunk = os.read(self.output, _CHUNK)
            except BlockingIOError:
                break
            chunks.append(chunk)
            ended = not chunk
        arrived = b"".join(chunks)
        # A carriage return ends a state of a progress bar, which is shown when the next one begins.
        end = len(arrived) if ended else max(arrived.rfind(b"\n"), arrived.rfind(b"\r")) + 1
        whole, self._unfinished = arrived[:end], arrived[end:]
        self.tail.extend(line for line in whole.decode(errors="replace").splitlines() if line.strip())
        return whole, ended

    def kill_hung(self) -> None:
        """Kill it, since it shows no sign of life. One that somebody has stopped hangs through no fault of its own."""
        import psutil  # of no use to a launch in which nothing hangs

        with contextlib.suppress(psutil.Error):
            status = psutil.Process(self.process.pid).status()
            self.stopped = status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        self.hung = True
        self.process.kill()

    def died_by_itself(self, struck: int) -> bool:
        """Whether it has ended, which must have happened, by what it did, as far as that can be told.

        struck: pid of the process that is known to have been sent its signal.
        """
        if self.hung:
            return not self.stopped
        code = self.process.returncode
        return code >= 0 or (-code in OWN and struck != self.process.pid)

    def describe_end(self) -> str:
        """How it ended, which must have happened: `scheduler tp0 (pid 7) was killed by SIGKILL`."""
        code = self.process.returncode
        how = f"exited with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        if self.hung:
            how = "hung and was killed"
        elif code == -signal.SIGKILL:
            how += " (by someone, or by the system because memory ran out)"
        return f"{self.program.title} (pid {self.process.pid}) {how}"


def start_child(program: Program, config_file: Path, listener: socket.socket) -> Child:
    """Start `program` in a session of its own, so that Ctrl-C in the terminal reaches the launcher alone.

    It inherits the listening socket if it is to have it, and no other descriptor.
    """
    # -P: the working folder is no place to import from; a folder named `engine` may lie in it.
    command = [sys.executable, "-P", "-m", program.module, "--config", str(config_file), *program.arguments]
    inherited: tuple[int, ...] = ()
    if program.listens:
        inherited = (listener.fileno(),)
        command += ["--fd", str(listener.fileno())]
    with blocked():
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=child_environment(),
            start_new_session=True,
            pass_fds=inherited,
        )
    assert process.stdout is not None
    output = process.stdout.fileno()
    os.set_blocking(output, False)
    return Child(program, process, output)


def child_environment() -> dict[str, str]:
    """This process's environment, in which the packages beside `engine` are found by every child."""
    root = str(Path(engine.__file__).parents[1])
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()}
    if root in installed:
        return dict(os.environ)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
