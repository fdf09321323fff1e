"""Records where the time of steps goes, on demand (contract §4.5)."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from engine.kernels.table import Program
from engine.wire.operation import Profile, Profiled
from scheduler_proc.planner import Extend, Planner
from scheduler_proc.trace import Step, write_trace

logger = logging.getLogger(__name__)

RUNNING = "Profiling is already in progress. Call /stop_profile first."
NOT_RUNNING = "Profiling is not in progress. Call /start_profile first."
MOST_STEPS = 20_000
"""Steps that a profile holds; what comes after is left out, so that a forgotten profile does not fill the memory."""


@dataclass(slots=True)
class Profiler:
    """At most one profile at a time. Off, it costs a step a few calls that return at once.

    on: steps are recorded now. steps_seen: steps of this process so far.
    answers: for `Profile` messages that are done; a thread that writes a file puts them in too.
    writing: files that are being written.
    """

    program: Program
    on: bool = False
    steps_seen: int = 0
    answers: queue.SimpleQueue[Profiled] = field(default_factory=queue.SimpleQueue)
    writing: int = 0
    _asked: Profile | None = None
    _began: float = 0.0
    _started: float = 0.0
    _marks: list[tuple[str, float]] = field(default_factory=list)
    _steps: list[Step] = field(default_factory=list)

    def handle(self, message: Profile) -> None:
        if message.action == "stop":
            if self._asked is None:
                self.answers.put(Profiled(message.key, NOT_RUNNING))
            else:
                self._stop([message.key])
            return
        error = RUNNING if self._asked is not None else _unwritable(message.folder)
        if error is not None:
            self.answers.put(Profiled(message.key, error))
            return
        self._asked = message
        logger.info("Profiling starts; the trace goes to %s", message.folder)
        if message.num_steps is None:
            self.answers.put(Profiled(message.key))

    def finished(self) -> list[Profiled]:
        """Answers that are due."""
        due = []
        while not self.answers.empty():
            answer = self.answers.get()
            self.writing -= answer.path is not None
            due.append(answer)
        return due

    def begin_step(self) -> None:
        if self._asked is None:
            return
        if not self.on and self.steps_seen + 1 >= (self._asked.start_step or 0):
            self.on = True
            self._began = time.perf_counter()
            self.program.set_profiling(True)
            self.program.take_profile()
        self._started = time.perf_counter()
        self._marks = []

    def mark(self, phase: str) -> None:
        """`phase` of the step has ended."""
        if self.on:
            self._marks.append((phase, 1e6 * (time.perf_counter() - self._began)))

    def end_step(self, plan: list[Extend], planner: Planner) -> None:
        """The step is over; with an empty plan nothing was computed, and it does not count."""
        if not plan:
            return
        self.steps_seen += 1
        if not self.on:
            return
        self.mark("emit")
        kernels = self.program.take_profile()
        if len(self._steps) < MOST_STEPS:
            usage = planner.memory.usage()
            self._steps.append(
                Step(
                    number=self.steps_seen,
                    started=1e6 * (self._started - self._began),
                    marks=self._marks,
                    requests=len(plan),
                    prefill_tokens=sum(step.count for step in plan if step.count > 1),
                    decode_tokens=sum(step.count == 1 for step in plan),
                    kernels=kernels,
                    running=len(planner.running),
                    waiting=len(planner.waiting),
                    used=usage.used,
                    cached=usage.cached,
                    free=usage.free,
                )
            )
            if len(self._steps) == MOST_STEPS:
                logger.warning("The profile is full after %d steps; what follows is left out", MOST_STEPS)
        assert self._asked is not None
        if self._asked.num_steps is not None and len(self._steps) >= self._asked.num_steps:
            self._stop([])

    def _stop(self, keys: list[int]) -> None:
        """End the profile and have it written beside the steps; `keys` are answered when that is done."""
        asked, steps = self._asked, self._steps
        assert asked is not None
        if asked.num_steps is not None:
            keys = [asked.key, *keys]
        if self.on:
            self.program.set_profiling(False)
        self._asked, self._steps, self.on = None, [], False
        self.writing += len(keys)
        threading.Thread(target=_write, args=(asked, steps, keys, self.answers), name="profile", daemon=True).start()


def _write(asked: Profile, steps: list[Step], keys: list[int], answers: queue.SimpleQueue[Profiled]) -> None:
    path = Path(asked.folder) / f"{asked.name}-TP-0.trace.json.gz"
    error = None
    try:
        write_trace(path, steps, {"program": "tokenmill", "steps": len(steps), "start_step": asked.start_step})
        logger.info("The profile of %d steps is in %s", len(steps), path)
    except Exception as failure:
        logger.exception("The profile cannot be written to %s", path)
        error = f"the profile cannot be written to {str(path)!r}: {failure}"
    for key in keys:
        answers.put(Profiled(key, error, str(path)))


def _unwritable(folder: str) -> str | None:
    """Why no file can be written to `folder`, which is made if need be; None when one can."""
    try:
        Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # a NUL in it is a ValueError
        return f"output_dir: {folder!r} cannot be made: {error}"
    return None if os.access(folder, os.W_OK | os.X_OK) else f"output_dir: {folder!r} cannot be written to"
