"""The scheduler: takes in requests, plans and runs steps, hands out what they produced."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
import numpy as np

from engine.checkpoints.task import Task
from engine.config import faults
from engine.config.logs import about
from engine.kernels.queued import QueueingProgram
from engine.kernels.table import Backend
from engine.wire.board import BEATS, Heart
from engine.wire.failures import internal_error
from engine.wire.operation import Profile, SlowDown, Tune
from engine.wire.results import Finish
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
from scheduler_proc.admissible import check_admissible
from scheduler_proc.answers import Answers
from scheduler_proc.control_failures import failed, failed_question
from scheduler_proc.generation import Generation
from scheduler_proc.kv_memory import InvariantError
from scheduler_proc.operation import Operation
from scheduler_proc.outputs import StepRows
from scheduler_proc.planner import Planner
from scheduler_proc.ranks import Ranks
from scheduler_proc.recorder import recorded
from scheduler_proc.request import Request, new_request
from scheduler_proc.runner import Runner
from scheduler_proc.statistics import Statistics
from scheduler_proc.steps import Steps
from scheduler_proc.trials import Trials
from scheduler_proc.weight_updates import WeightUpdates

logger = logging.getLogger(__name__)

NO_PRIORITY = "Using priority is disabled for this server. Please send a new request without a priority."
QUEUE_FULL = "The request queue is full."
OUTRANKED = "The request is aborted by a higher priority request."
PATIENCE = 0.01
"""Seconds between two looks at what no message tells of: the thread of a weight update, the deadline of a flush."""

HEARING = 0.01
"""Seconds after which messages that are still there wait for the next step."""
_AT_ONCE = 32


class SchedulerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the loop.

    longest: most prompt + output tokens of a request (`max_req_len`); max_input: prompts must be shorter.
    max_queued, max_queued_tokens: requests, and prompt tokens, that may wait.
    waiting_timeout, running_timeout: seconds, None for no limit.
    strict: an invariant that does not hold ends the process (else it is logged).
    report: the part of `/server_info` that does not change.
    task: what the model is served for. vocab_size: token ids lie below it; None: not known.
    """

    eos_ids: list[int]
    longest: int
    max_input: int
    max_queued: int | None
    truncate: bool
    refuse_priority: bool
    original_logprobs: bool
    waiting_timeout: float | None
    running_timeout: float | None
    strict: bool
    report: dict[str, Any]
    task: Task = Task()
    max_queued_tokens: int | None = None
    vocab_size: int | None = None


@dataclass(slots=True)
class Scheduler:
    """updates: None where there are no weights to be updated. first_version: of the weights that serve at first.

    generation: whether steps may be computed, and with which weights. heart: None where nobody listens.
    ranks: the others of a divided model. queueing: the program, where steps overlap.
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
    arrivals: int = 0
    updates: WeightUpdates | None = None
    first_version: str = "default"
    heart: Heart | None = None
    ranks: Ranks | None = None
    queueing: QueueingProgram | None = None
    trials: Trials = field(init=False)
    generation: Generation = field(init=False)
    operation: Operation = field(init=False)
    steps: Steps = field(init=False)

    def __post_init__(self) -> None:
        self.trials = Trials(self.planner, self.requests, self.heart.board if self.heart else None)
        self.operation = Operation(self.runner.program, self.planner, self.outbox)
        self.generation = Generation(self.planner, self.requests, self.outbox, self.first_version, self.updates)
        self.steps = Steps(
            self.planner, self.trials, self.runner, self.backend, self.outbox, self.statistics, self.operation,
            self.requests, self.generation, drop=self._drop, eos_ids=self.settings.eos_ids,
            original_logprobs=self.settings.original_logprobs, task=self.settings.task, queueing=self.queueing,
        )  # fmt: skip

    @property
    def weight_version(self) -> str:
        """Of the weights that serve."""
        return self.generation.weight_version

    def loop(self) -> None:
        """Serve until the process is ended."""
        while True:
            self._beat()
            if not self.requests or self.generation.halted:
                self._settle()
                self._rest()
            self.hear()
            self.turn()

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
        if self.requests and not self.generation.halted:
            self.step()
        self._answer_flushes()
        self.operation.answer()

    def _rest(self) -> None:
        """Wait for a message; not for long where something else may happen as well."""
        if self.requests or self.flushes or self.generation.updating or self.operation.busy:
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
                self._drop(self.requests[message.key])
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
            self.steps.send(rows)

    def _handle(self, message: ToScheduler) -> None:
        if not isinstance(message, Admit):
            self._settle()
        match message:
            case Admit():
                self._admit(message)
            case Abort(keys):
                self._abort(keys)
            case StopSeen(keys, attempts):
                for key, attempt in zip(keys, attempts, strict=True):
                    if key in self.requests and self.requests[key].admit.attempt == attempt:
                        self._drop(self.requests[key])
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

    def step(self) -> None:
        """Plan and run one step, and send what it produced."""
        self.operation.begin_step()
        rows = StepRows()
        self._expire(rows)
        self.steps.step(rows)

    def _start_over(self, message: StartOver) -> None:
        for request in [r for r in self.requests.values() if r.key < message.before]:
            self._drop(request)
        if message.paused is not None:
            self.generation.set_paused(message.paused)
        self.outbox.send(StartedOver(message.before, self.generation.paused, self.weight_version))

    def state(self) -> dict[str, Any]:
        """The scheduler's part of `/server_info`, and the counts that health and load routes need."""
        usage = self.planner.memory.usage()
        return self.settings.report | {
            "last_gen_throughput": self.statistics.throughput,
            "num_running_reqs": len(self.planner.running),
            "num_waiting_reqs": len(self.planner.waiting),
            "num_used_tokens": usage.used,
            "num_cached_tokens": usage.cached,
            "num_free_tokens": usage.free,
            "num_retractions": self.planner.preemptions,
            **self.statistics.report(self.planner),
        }

    def _admit(self, admit: Admit) -> None:
        older = self.requests.get(admit.key)
        if older is not None:
            if admit.attempt <= older.admit.attempt:
                return  # it was still on its way when it was replayed
            self._drop(older)
        prompt_length = len(admit.input_ids) // 4
        limit = self.settings.max_input
        if prompt_length >= limit:
            if not self.settings.truncate:
                self._refuse(
                    admit,
                    f"Input length ({prompt_length} tokens) exceeds the maximum allowed length ({limit} tokens). "
                    "Use a shorter input or enable --allow-auto-truncate.",
                    400,
                )
                return
            cut = "Request %s: prompt cut from %d to %d tokens"
            logger.warning(cut, admit.rid, prompt_length, limit - 1, extra=about(admit.rid))
            admit = msgspec.structs.replace(admit, input_ids=admit.input_ids[: 4 * (limit - 1)])
        if (admit.vector is None) != (self.settings.task.kind == "generation"):
            self._refuse(admit, f"This server's model is served for {self.settings.task.kind} only.", 400)
            return
        if admit.priority is not None and self.settings.refuse_priority:
            self._refuse(admit, NO_PRIORITY, 503)
            return
        if faults.armed:
            faults.spring("admit", np.frombuffer(admit.input_ids + admit.output_ids, "<i4"))
        check_admissible(admit, self.settings.vocab_size, self.settings.longest)
        self.arrivals += 1
        request = new_request(admit, self.arrivals, self.settings.longest)
        self.trials.enter(request)
        if not self._enqueue(request):
            self._refuse(admit, QUEUE_FULL, 503)

    def _enqueue(self, request: Request) -> bool:
        """Put a request into the queue. When that is full a less urgent one may have to leave it."""
        # While nothing is computed the queue may grow: nobody is to see an error through a pause.
        replayed = request.admit.attempt > 0  # it has had its place already
        if not self.generation.paused and not replayed:
            leaving = self.planner.make_room(request, self.settings.max_queued, self.settings.max_queued_tokens)
            if leaving is None:
                return False
            for last in leaving:
                self._end_waiting(last, Finish("abort", message=OUTRANKED, status=503))
        self.planner.enqueue(request)
        self.requests[request.key] = request
        if logger.isEnabledFor(logging.DEBUG):
            rid = request.admit.rid
            logger.debug("request %s waits: %d tokens", rid, request.length, extra=about(rid))
        return True

    def _refuse(self, admit: Admit, message: str, status: int) -> None:
        self.outbox.send(Ended(admit.key, admit.attempt, Finish("abort", message=message, status=status), "scheduler"))

    def _abort(self, keys: list[int]) -> None:
        rows = StepRows()
        for request in [self.requests[key] for key in dict.fromkeys(keys) if key in self.requests]:
            if not request.delivered and request not in self.planner.running:
                self._end_waiting(request, Finish("abort", message="Abort in waiting queue"))
            else:
                self._drop(request)
                rows.add(request, finish=Finish("abort", message="Aborted"))
        self.steps.send(rows)

    def _end_waiting(self, request: Request, finish: Finish) -> None:
        """End a request that has produced nothing yet."""
        self._drop(request)
        self.outbox.send(Ended(request.key, request.admit.attempt, finish, "scheduler"))

    def _drop(self, request: Request) -> None:
        """Forget a request, wherever it is."""
        del self.requests[request.key]
        if logger.isEnabledFor(logging.DEBUG):
            rid = request.admit.rid
            logger.debug("request %s leaves after %d new tokens", rid, request.generated, extra=about(rid))
        if request in self.planner.running:
            self.planner.finish(request)
        else:
            self.planner.unqueue(request)

    def _expire(self, rows: StepRows) -> None:
        """End requests that have waited or run longer than allowed."""
        now = time.monotonic()
        if self.settings.waiting_timeout is not None:
            for request in [r for r in self.planner.waiting if not r.delivered]:
                if now - request.arrived_at > self.settings.waiting_timeout:
                    message = "Request waiting timeout reached."
                    self._end_waiting(request, Finish("abort", message=message, status=503))
        if self.settings.running_timeout is not None:
            for request in list(self.planner.running):
                if now - (request.started_at or now) > self.settings.running_timeout:
                    self._drop(request)
                    message = "Request running timeout reached."
                    rows.add(request, finish=Finish("abort", message=message, status=503))

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
        except Exception as error:
            logger.exception("The cache cannot be flushed")
            self.planner.memory.check(self.planner.running)
            return error
        logger.info("Cache flushed")
        return None
