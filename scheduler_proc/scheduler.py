"""The scheduler: takes in requests, plans and runs steps, hands out what they produced."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec

from engine.checkpoints.task import Task
from engine.config.logs import about
from engine.kernels.table import Backend
from engine.wire.operation import Profile, SlowDown, Tune
from engine.wire.results import Finish
from engine.wire.sockets import Inbox, Outbox
from engine.wire.to_detokenizer import NO_TOKEN, ToDetokenizer
from engine.wire.to_frontend import Ended, ExpertsRecorded, Flushed, State
from engine.wire.to_scheduler import Abort, Admit, FlushCache, QueryState, RecordExperts, StopSeen, ToScheduler
from engine.wire.weights import PauseGeneration, WeightControl
from scheduler_proc.generation import Generation
from scheduler_proc.kv_memory import InvariantError
from scheduler_proc.operation import Operation
from scheduler_proc.outputs import StepRows
from scheduler_proc.planner import Extend, Planner
from scheduler_proc.request import Request, new_request
from scheduler_proc.runner import Runner
from scheduler_proc.sampler import SampledRow, sample
from scheduler_proc.statistics import Statistics
from scheduler_proc.vectors import is_finite, vectors_message
from scheduler_proc.weight_updates import WeightUpdates

logger = logging.getLogger(__name__)

NO_PRIORITY = "Using priority is disabled for this server. Please send a new request without a priority."
QUEUE_FULL = "The request queue is full."
OUTRANKED = "The request is aborted by a higher priority request."
NOT_FINITE = "The vector of this request is not finite: the model's weights or its dtype do not suit it."
PATIENCE = 0.01
"""Seconds between two looks at what no message tells of: the thread of a weight update, the deadline of a flush."""
OUT_OF_MEMORY = "Out of memory even after retracting all other requests in the decode batch. Aborting the last request."


class SchedulerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the loop.

    longest: most prompt + output tokens of a request (`max_req_len`); max_input: prompts must be shorter.
    waiting_timeout, running_timeout: seconds, None for no limit.
    strict: an invariant that does not hold ends the process (else it is logged).
    report: the part of `/server_info` that does not change.
    task: what the model is served for.
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


@dataclass(slots=True)
class Scheduler:
    """updates: None where there are no weights to be updated. first_version: of the weights that serve at first.

    generation: whether steps may be computed, and with which weights.
    """

    settings: SchedulerSettings
    planner: Planner
    runner: Runner
    backend: Backend
    inbox: Inbox[ToScheduler]
    outbox: Outbox[ToDetokenizer]
    statistics: Statistics
    requests: dict[int, Request] = field(default_factory=dict)
    flushes: list[tuple[FlushCache, float]] = field(default_factory=list)
    arrivals: int = 0
    updates: WeightUpdates | None = None
    first_version: str = "default"
    generation: Generation = field(init=False)
    operation: Operation = field(init=False)

    def __post_init__(self) -> None:
        self.operation = Operation(self.runner.program, self.planner, self.outbox)
        self.generation = Generation(self.planner, self.requests, self.outbox, self.first_version, self.updates)

    @property
    def weight_version(self) -> str:
        """Of the weights that serve."""
        return self.generation.weight_version

    def loop(self) -> None:
        """Serve until the process is ended."""
        while True:
            if not self.requests or self.generation.halted:
                self._rest()
            for message in self.inbox.drain():
                self.handle(message)
            self.turn()

    def turn(self) -> None:
        """One round of the loop: what is due between steps, and a step if there is anything to compute."""
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
            self.inbox.wait(None)

    def idle(self) -> None:
        """What is done each time the last request has left."""
        try:
            self.planner.memory.check(self.planner.running)
        except InvariantError:
            if self.settings.strict:
                raise
            logger.exception("The KV pool is not whole; this is a bug")

    def handle(self, message: ToScheduler) -> None:
        match message:
            case Admit():
                self._admit(message)
            case Abort(keys):
                self._abort(keys)
            case StopSeen(keys):
                for key in keys:
                    if key in self.requests:
                        self._drop(self.requests[key])
            case FlushCache(_, timeout):
                self.flushes.append((message, time.monotonic() + timeout))
            case QueryState(key):
                self.outbox.send(State(key, self.state()))
            case RecordExperts(key, action):
                self.outbox.send(ExpertsRecorded(key, self._record_experts(action)))
            case Tune() | SlowDown() | Profile():
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
        plan, hopeless = self.planner.plan()
        self.operation.mark("plan")
        for request in hopeless:
            del self.requests[request.key]
            rows.add(request, finish=Finish("abort", message=OUT_OF_MEMORY, status=500))
        if plan:
            self.statistics.begin(plan)
            started = time.perf_counter()
            logits, requests = self.runner.run(plan)
            self.operation.mark("forward")
            if self.settings.task.kind != "generation":
                self._store_prefills(plan)
                self._emit_vectors(requests, logits)
                self.statistics.step(plan, 0, time.perf_counter() - started, self.planner)
            else:
                sampled = self._sample(logits, requests)
                self.operation.mark("sample")
                self._store_prefills(plan)
                for request, row in zip(requests, sampled, strict=True):
                    self._emit(request, row, rows)
                self.statistics.step(plan, len(sampled), time.perf_counter() - started, self.planner)
        if rows.keys:
            self.outbox.send(rows.message(self.weight_version))
        self.operation.end_step(plan)

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

    def _record_experts(self, action: str) -> str | None:
        """Returns why it could not be done."""
        recorder = self.runner.recorder
        if recorder is None:
            return "the expert distribution is not recorded: --expert-distribution-recorder-mode is not set"
        match action:
            case "start":
                recorder.start()
            case "stop":
                recorder.stop()
            case _:
                try:
                    recorder.dump(rank=0)
                except OSError as error:
                    logger.exception("The expert distribution cannot be written")
                    folder = recorder.settings.folder
                    return f"the expert distribution cannot be written to {str(folder)!r}: {error.strerror}"
        return None

    def _admit(self, admit: Admit) -> None:
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
        self.arrivals += 1
        request = new_request(admit, self.arrivals, self.settings.longest)
        if not self._enqueue(request):
            self._refuse(admit, QUEUE_FULL, 503)

    def _enqueue(self, request: Request) -> bool:
        """Put a request into the queue. When that is full a less urgent one may have to leave it."""
        waiting = self.planner.waiting
        most = self.settings.max_queued
        # While nothing is computed the queue may grow: nobody is to see an error through a pause.
        if most is not None and len(waiting) >= most and not self.generation.paused:
            if not self.planner.limits.priorities:
                return False
            # A preempted request that has produced something already keeps its place: its client reads it.
            unopened = [r for r in waiting if not r.opened]
            if not unopened:
                return False
            last = max(unopened, key=lambda r: (self.planner.urgency(r), r.number))
            if self.planner.urgency(last) <= self.planner.urgency(request):
                return False
            self._end_waiting(last, Finish("abort", message=OUTRANKED, status=503))
        waiting.append(request)
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
            if request in self.planner.waiting and not request.opened:
                self._end_waiting(request, Finish("abort", message="Abort in waiting queue"))
            else:
                self._drop(request)
                rows.add(request, finish=Finish("abort", message="Aborted"))
        if rows.keys:
            self.outbox.send(rows.message(self.weight_version))

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
            self.planner.waiting.remove(request)

    def _expire(self, rows: StepRows) -> None:
        """End requests that have waited or run longer than allowed."""
        now = time.monotonic()
        if self.settings.waiting_timeout is not None:
            for request in [r for r in self.planner.waiting if not r.opened]:
                if now - request.arrived_at > self.settings.waiting_timeout:
                    message = "Request waiting timeout reached."
                    self._end_waiting(request, Finish("abort", message=message, status=503))
        if self.settings.running_timeout is not None:
            for request in list(self.planner.running):
                if now - (request.started_at or now) > self.settings.running_timeout:
                    self._drop(request)
                    message = "Request running timeout reached."
                    rows.add(request, finish=Finish("abort", message=message, status=503))

    def _sample(self, logits: Any, requests: list[Request]) -> list[SampledRow]:
        if not requests:
            return []
        settings = self.settings
        return sample(self.backend, logits, requests, settings.eos_ids, original_logprobs=settings.original_logprobs)

    def _store_prefills(self, plan: list[Extend]) -> None:
        """Share what a prefill has computed at once, not only when its request ends."""
        for step in plan:
            # A request that comes back prefills its earlier output too, perhaps in one chunk with its prompt.
            if step.count > 1 or step.request.computed <= step.request.prompt_length:
                self.planner.memory.store(step.request)

    def _emit(self, request: Request, row: SampledRow, rows: StepRows) -> None:
        """Take a sampled token into its request, and end that if this was its last."""
        if request.max_new_tokens <= request.generated:  # a prompt that is only to be computed
            logprobs = row.logprobs and msgspec.structs.replace(row.logprobs, logprob=None, top=None)
            self._end(request, NO_TOKEN, _length(request), rows, logprobs)
            return
        if row.token is None:
            self._end(request, NO_TOKEN, Finish("stop", matched="NaN happened"), rows)
            return
        request.append(row.token)
        finish = self._finish(request, row.token)
        if finish is None:
            rows.add(request, row.token, logprobs=row.logprobs)
        else:
            self._end(request, row.token, finish, rows, row.logprobs)

    def _emit_vectors(self, requests: list[Request], heads: Any) -> None:
        """End the requests whose prompts are computed, row i of `heads` [R, W] being that of requests[i]."""
        if not requests:
            return
        made, hidden = heads.numpy(), self.runner.program.pooled().numpy()
        good = []
        for i, request in enumerate(requests):
            self._drop(request)
            if is_finite(made[i]):
                good.append(i)
            else:
                finish = Finish("abort", message=NOT_FINITE, status=500)
                self.outbox.send(Ended(request.key, request.admit.attempt, finish, "scheduler"))
        if good:
            kept = [requests[i] for i in good]
            rows = [made[i] for i in good]
            self.outbox.send(vectors_message(kept, rows, hidden[good], self.settings.task, self.weight_version))

    def _end(self, request: Request, token: int, finish: Finish, rows: StepRows, logprobs: Any = None) -> None:
        self._drop(request)
        rows.add(request, token, finish, logprobs)

    def _finish(self, request: Request, token: int) -> Finish | None:
        """Whether `token`, the newest, ends the request (contract §6.3, rows 4 and 5)."""
        sampling = request.admit.sampling
        if not sampling.ignore_eos and (token in self.settings.eos_ids or token in sampling.stop_token_ids):
            return Finish("stop", matched=token)
        return _length(request) if request.generated >= request.max_new_tokens else None

    def _answer_flushes(self) -> None:
        """Flush if idle, and answer each call that this or its own deadline has settled."""
        now, idle = time.monotonic(), not self.requests or (self.generation.paused and not self.planner.running)
        due = [flush for flush, deadline in self.flushes if idle or now >= deadline]
        if not due:
            return
        self.flushes = [(flush, deadline) for flush, deadline in self.flushes if not idle and now < deadline]
        if idle:
            self.planner.memory.flush()
            logger.info("Cache flushed")
        for flush in due:
            self.outbox.send(Flushed(flush.key, idle))


def _length(request: Request) -> Finish:
    return Finish("length", length=request.max_new_tokens)
