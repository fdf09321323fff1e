"""What an operator asks of the running scheduler: profiles, slower steps, log levels."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from engine.kernels.table import Program
from engine.wire.operation import MOST_SLEEP, OperationControl, Profile, SlowDown, Tune
from engine.wire.tuning import tune
from scheduler_proc.answers import Sender
from scheduler_proc.planner import Extend, Planner
from scheduler_proc.profiler import Profiler

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Operation:
    """pause: seconds of sleep before each step, for tests."""

    program: Program
    planner: Planner
    outbox: Sender
    pause: float = 0.0
    profiler: Profiler = field(init=False)

    def __post_init__(self) -> None:
        self.profiler = Profiler(self.program)

    @property
    def busy(self) -> bool:
        """Whether an answer will be due that no message tells of."""
        return self.profiler.writing > 0

    def handle(self, message: OperationControl) -> None:
        match message:
            case Tune():
                tune(message)
                self.outbox.send(message)
            case SlowDown(seconds):
                if not 0 <= seconds <= MOST_SLEEP:
                    raise ValueError(f"the sleep before each step must be in [0, {MOST_SLEEP:g}] s, got {seconds}")
                if seconds != self.pause:  # it is told again to all when a process was replaced
                    logger.warning("Each step is preceded by a sleep of %g s from now on", seconds)
                self.pause = seconds
            case Profile():
                self.profiler.handle(message)

    def answer(self) -> None:
        """Send the answers that are due."""
        if not self.profiler.answers.empty():
            for answer in self.profiler.finished():
                self.outbox.send(answer)

    def begin_step(self) -> None:
        if self.pause:
            time.sleep(self.pause)
        self.profiler.begin_step()

    def mark(self, phase: str) -> None:
        """`phase` of the step has ended."""
        self.profiler.mark(phase)

    def end_step(self, plan: list[Extend]) -> None:
        self.profiler.end_step(plan, self.planner)
