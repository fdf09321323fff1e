"""The processes of the server, what they hold, and whether that is more than it was."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field

import psutil

ROLES = ("tokenizer", "scheduler", "detokenizer", "frontend")
_MODULES = {f"{role}_proc": role for role in ROLES[:3]} | {"http_frontend": "frontend"}
_TITLE = "tokenmill: "
SETTLED = 10.0
"""Seconds of a process's life after which its memory is looked at."""


@dataclass(frozen=True)
class Sample:
    """What a process held at a quiet point. age: seconds it had lived."""

    at: float
    role: str
    pid: int
    age: float
    memory: int
    descriptors: int


@dataclass
class Tree:
    """The launcher and its children. seen: every process that has ever belonged to it."""

    launcher: psutil.Process
    seen: set[psutil.Process] = field(default_factory=set)
    samples: list[Sample] = field(default_factory=list)

    def processes(self) -> dict[str, psutil.Process]:
        """The living children by role."""
        found = {}
        for child in self.launcher.children(recursive=True):
            self.seen.add(child)
            if (role := _role(child)) is not None:
                found[role] = child
        return found

    def runs(self, process: psutil.Process) -> bool:
        try:
            return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def faults(self) -> list[str]:
        """What is wrong with the set of processes: of a whole server there is one of each, and no other
        but those that try grammars."""
        children = [child for child in self.launcher.children(recursive=True) if not _tries_grammars(child)]
        roles = sorted(str(_role(child)) for child in children)
        if roles == sorted(ROLES):
            return []
        return [f"the launcher's children are {[(child.pid, _role(child), _status(child)) for child in children]}"]

    def clients(self) -> int:
        """Open connections of clients, by the frontend's descriptors."""
        frontend = self.processes().get("frontend")
        if frontend is None:
            return 0
        return sum(one.status != psutil.CONN_LISTEN for one in frontend.net_connections("tcp"))

    def sample(self) -> None:
        for role, process in {**self.processes(), "launcher": self.launcher}.items():
            age = time.time() - process.create_time()
            memory, descriptors = process.memory_info().rss, process.num_fds()
            self.samples.append(Sample(time.monotonic(), role, process.pid, age, memory, descriptors))

    def left(self) -> list[str]:
        """Processes that have outlived the server."""
        return [f"pid {process.pid} still runs: {_status(process)}" for process in self.seen if self.runs(process)]

    def growth(self, slack: int, pool: int, descriptors_slack: int) -> tuple[list[str], list[str]]:
        """A line for each role, and what of it is too much.

        Memory: within one process's life from its first quiet point on, and between the medians of the first and the
        last half of all quiet points of the role. The scheduler's pool (`pool` bytes) comes to be as it is used.
        Descriptors: the most at any quiet point against the fewest.
        """
        lines, faults = [], []
        for role in (*ROLES, "launcher"):
            samples = [s for s in self.samples if s.role == role and s.age > SETTLED]
            if len(samples) < 2:
                lines.append(f"  {role:12} too few quiet points: {len(samples)}")
                continue
            within, over = _within(samples), _over(samples)
            fewest, most = min(s.descriptors for s in samples), max(s.descriptors for s in samples)
            memory = statistics.median(s.memory for s in samples)
            lines.append(
                f"  {role:12} {len(samples):3} quiet points of {len({s.pid for s in samples})} processes; RSS median "
                f"{memory / 2**20:.1f} MiB, growth in a life {within / 2**20:+.1f}, over all {over / 2**20:+.1f} MiB; "
                f"descriptors {fewest} to {most}"
            )
            if max(within, over) > slack + (pool if role == "scheduler" else 0):
                faults.append(f"the memory of the {role} grows: {lines[-1].strip()}")
            if most - fewest > descriptors_slack:
                faults.append(f"the descriptors of the {role} grow: {lines[-1].strip()}")
        return lines, faults


def _within(samples: list[Sample]) -> int:
    lives: dict[int, list[int]] = defaultdict(list)
    for sample in samples:
        lives[sample.pid].append(sample.memory)
    return max(life[-1] - life[0] for life in lives.values())


def _over(samples: list[Sample]) -> float:
    half = len(samples) // 2
    return statistics.median(s.memory for s in samples[half:]) - statistics.median(s.memory for s in samples[:half])


def _role(process: psutil.Process) -> str | None:
    try:
        words = process.cmdline()
        if process.status() == psutil.STATUS_ZOMBIE or not words:
            return None
    except psutil.NoSuchProcess:
        return None
    if words[0].startswith(_TITLE):
        name = words[0].removeprefix(_TITLE).split()[0]
        return name if name in ROLES else None
    return next((_MODULES[word] for word in words if word in _MODULES), None)


def _tries_grammars(process: psutil.Process) -> bool:
    """Whether it is one of the scheduler's own."""
    try:
        return "scheduler_proc.grammar_trial" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def _status(process: psutil.Process) -> str:
    try:
        return f"{process.status()}, {' '.join(process.cmdline())[:80]}"
    except psutil.NoSuchProcess:
        return "gone"
