"""The scheduler: takes in requests, plans and runs steps, hands out what they produced."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from engine.config import faults
from engine.kernels.queued import QueueingProgram
from engine.kernels.table import Backend
from engine.wire.board import BEATS, Heart
from engine.wire.failures import internal_error
from engine.wire.operation import Profile, SlowDown, Tune
from engine.wire.sockets import Inbox
from engine.wire.to_frontend import Ended, Flushed, StartedOver, State
from engine.wire.to_scheduler import (
    Abort,
    Admit,
    FlushCache,
    QueryState,
    RecordExperts,
    StartOver,
    StopSeen,
    ToScheduler,
)
from engine.wire.weights import PauseGeneration, WeightControl
from scheduler_proc.admission import Admission
from scheduler_proc.answers import Answers
from scheduler_proc.control_failures import failed, failed_question
from scheduler_proc.emission import Emission
from scheduler_proc.generation import Generation
from scheduler_proc.grammars import Grammars
from scheduler_proc.kv_memory import InvariantError
from scheduler_proc.operation import Operation
from scheduler_proc.outputs import StepRows
from scheduler_proc.planner import Planner
from scheduler_proc.ranks import Ranks
from scheduler_proc.recorder import recorded
from scheduler_proc.request import Request
from scheduler_proc.runner import Runner
from scheduler_proc.settings import SchedulerSettings
from scheduler_proc.statistics import Statistics
from scheduler_proc.steps import Steps
from scheduler_proc.trials import Trials
from scheduler_proc.weight_updates import WeightUpdates

logger = logging.getLogger(__name__)

PATIENCE = 0.01
"""Seconds between two looks at what no message tells of: the thread of a weight update, the deadline of a flush."""

COMPILING = 0.002
"""The same for grammars, most of which are compiled in less."""

HEARING = 0.01
"""Seconds after which messages that are still there wait for the next step."""
_AT_ONCE = 32


@dataclass(slots=True)
class Scheduler:
    """updates: None where there are no weights to be updated. first_version: of the weights that serve at first.

    generation: whether steps may be computed, and with which weights. heart: None where nobody listens.
    ranks: the others of a divided model. queueing: the program, where steps overlap. grammars: None
    where no output can be constrained.
    """

    settings: SchedulerSettings
    planner: Planner
    runner: Runner
    backend: Backend
    inbox: Inbox[ToScheduler]
    outbox: Answers
    statistics: Statistics
    requests: dict[int, Request] = field(default_factory=dict)
    flushes: list[tuple[FlushCache, float]] = field(default_factory=list)
    updates: WeightUpdates | None = None
    first_version: str = "default"
    heart: Heart | None = None
    ranks: Ranks | None = None
    queueing: QueueingProgram | None = None
    grammars: Grammars | None = None
    trials: Trials = field(init=False)
    generation: Generation = field(init=False)
    admission: Admission = field(init=False)
    operation: Operation = field(init=False)
    emission: Emission = field(init=False)
    steps: Steps = field(init=False)

    def __post_init__(self) -> None:
        self.trials = Trials(self.planner, self.requests, self.heart.board if self.heart else None)
        self.operation = Operation(self.runner.program, self.planner, self.outbox)
        self.generation = Generation(self.planner, self.requests, self.outbox, self.first_version, self.updates)
        self.admission = Admission(
            self.settings, self.planner, self.requests, self.outbox, self.generation, self.trials,
            self.grammars,
        )  # fmt: skip
        self.emission = Emission(
            self.outbox, self.requests, self.generation, self.admission.drop, self.settings.eos_ids, self.settings.task
        )
        self.steps = Steps(
            self.planner, self.trials, self.runner, self.backend, self.statistics, self.operation, self.requests,
            self.emission, eos_ids=self.settings.eos_ids, original_logprobs=self.settings.original_logprobs,
            task=self.settings.task, queueing=self.queueing,
        )  # fmt: skip

    @property
    def weight_version(self) -> str:
        """Of the weights that serve."""
        return self.generation.weight_version

    def loop(self) -> None:
        """Serve until the process is ended."""
        while True:
            self._beat()
            if not self.requests or self.generation.halted or self._only_grammars:
                self._settle()
                self._rest()
            self.hear()
            self.turn()

    @property
    def _only_grammars(self) -> bool:
        """Whether all requests wait for their grammars."""
        return not self.planner.running and all(request.awaits_grammar for request in self.planner.waiting)

    def hear(self) -> None:
        """Carry out the messages that are there; of very many only some, since running requests wait for their step."""
        until = time.monotonic() + HEARING
        while messages := self.inbox.drain(_AT_ONCE):
            for message in messages:
                if not self.outbox.known(message):
                    self.handle(message)
            if time.monotonic() > until:
                break

    def _beat(self) -> None:
        if self.heart is not None:
            self.heart.beat()
            self.heart.board.note_load(len(self.planner.running), self.planner.queued)
        if faults.armed:
            faults.spring_in_loop("scheduler")

    def turn(self) -> None:
        """One round of the loop: what is due between steps, and a step if there is anything to compute."""
        if self.generation.updating:
            self._settle()
        self.generation.update_weights()
        self.admission.collect_grammars()
        if self.requests and not self.generation.halted:
            self.step()
        self._answer_flushes()
        self.operation.answer()

    def _rest(self) -> None:
        """Wait for a message; not for long where something else may happen as well."""
        if self.grammars is not None and self.grammars.jobs:
            self.inbox.wait(COMPILING)
        elif self.requests or self.flushes or self.generation.updating or self.operation.busy:
            self.inbox.wait(PATIENCE)
        else:
            self.idle()
            while not self.inbox.wait(BEATS):
                self._beat()

    def idle(self) -> None:
        """What is done each time the last request has left."""
        try:
            self.planner.memory.check(self.planner.running)
        except InvariantError:
            if self.settings.strict:
                raise
            logger.exception("The KV pool is not whole; this is a bug")

    def handle(self, message: ToScheduler) -> None:
        """Carry a message out. One that fails ends its request, or is answered with an error, and nothing else.

        Raises InvariantError when it has left the pool broken.
        """
        try:
            self._handle(message)
        except InvariantError:
            raise
        except Exception as error:
            self._failed(message, error)

    def _failed(self, message: ToScheduler, error: Exception) -> None:
        if isinstance(message, Admit):
            if message.key in self.requests:
                self.admission.drop(self.requests[message.key])
            finish = internal_error(logger, "admitting", message.rid, error)
            self.outbox.send(Ended(message.key, message.attempt, finish, "scheduler"))
        else:
            logger.exception("%s failed", type(message).__name__)
            if (answer := failed(message, error)) is not None:
                self.outbox.send(answer)
        self.planner.memory.check(self.planner.running)

    def _settle(self) -> None:
        """Where steps overlap: take in the one that is computed now, so that all is known."""
        if self.steps.flight is not None:
            rows = StepRows()
            self.steps.collect(rows)
            self.emission.send(rows)

    def _handle(self, message: ToScheduler) -> None:
        if not isinstance(message, Admit):
            self._settle()
        match message:
            case Admit():
                self.admission.admit(message)
            case Abort(keys):
                self._abort(keys)
            case StopSeen(keys, attempts):
                for key, attempt in zip(keys, attempts, strict=True):
                    if key in self.requests and self.requests[key].admit.attempt == attempt:
                        self.admission.drop(self.requests[key])
            case StartOver():
                self._start_over(message)
            case FlushCache(_, timeout):
                self.flushes.append((message, time.monotonic() + timeout))
            case QueryState(key):
                self.outbox.send(State(key, self.state()))
            case RecordExperts(key):
                answer = partial(recorded, message, self.runner.recorder, self.ranks)
                self.generation.answer(key, answer, asks_ranks=self.ranks is not None)
            case Tune() | SlowDown() | Profile():
                if self.ranks is not None and isinstance(message, Tune):
                    self.ranks.tell(message)
                self.operation.handle(message)
            case _:
                self._control(message)

    def _control(self, message: WeightControl) -> None:
        if isinstance(message, PauseGeneration) and message.mode == "abort":
            self._abort(list(self.requests))
        self.generation.handle(message)

    def _abort(self, keys: list[int]) -> None:
        rows = StepRows()
        self.admission.abort(keys, rows)
        self.emission.send(rows)

    def step(self) -> None:
        """Plan and run one step, and send what it produced."""
        self.operation.begin_step()
        rows = StepRows()
        self.admission.expire(rows)
        self.steps.step(rows)

    def _start_over(self, message: StartOver) -> None:
        for request in [r for r in self.requests.values() if r.key < message.before]:
            self.admission.drop(request)
        if message.paused is not None:
            self.generation.set_paused(message.paused)
        self.outbox.send(StartedOver(message.before, self.generation.paused, self.weight_version))

    def state(self) -> dict[str, Any]:
        """The scheduler's part of `/server_info`, and the counts that health and load routes need."""
        usage = self.planner.memory.usage()
        grammars = sum(request.awaits_grammar for request in self.planner.waiting)
        return self.settings.report | {
            "last_gen_throughput": self.statistics.throughput,
            "num_running_reqs": len(self.planner.running),
            "num_waiting_reqs": len(self.planner.waiting) - grammars,
            "num_grammar_reqs": grammars,
            "num_used_tokens": usage.used,
            "num_cached_tokens": usage.cached,
            "num_free_tokens": usage.free,
            "num_retractions": self.planner.preemptions,
            **self.statistics.report(self.planner),
        }

    def _answer_flushes(self) -> None:
        """Flush if idle, and answer each call that this or its own deadline has settled."""
        now, idle = time.monotonic(), not self.requests or (self.generation.paused and not self.planner.running)
        due = [flush for flush, deadline in self.flushes if idle or now >= deadline]
        if not due:
            return
        self.flushes = [(flush, deadline) for flush, deadline in self.flushes if not idle and now < deadline]
        error = self._flush() if idle else None
        for flush in due:
            self.outbox.send(Flushed(flush.key, idle) if error is None else failed_question(flush.key, error))

    def _flush(self) -> Exception | None:
        """Returns what has gone wrong."""
        try:
            self.planner.memory.flush()
            if self.grammars is not None:
                self.grammars.flush()
        except Exception as error:
            logger.exception("The cache cannot be flushed")
            self.planner.memory.check(self.planner.running)
            return error
        logger.info("Cache flushed")
        return None
