"""One step: planned, computed, sampled and handed out, with each failure kept to the request that causes it.

A forward pass that fails is run once more: a passing fault costs nothing. When it fails again, each of its requests is
computed by itself, so that only the culprit ends. What a failed pass has written into the KV pool is written anew by
the next one, or its slots are given back: nothing of it is ever shared. Where memory ran out, the pass is cut in half.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch

from engine.checkpoints.task import Task
from engine.config import faults
from engine.kernels.queued import QueueingProgram
from engine.kernels.table import Backend
from engine.parallel.group import GroupLostError
from engine.wire.failures import internal_error
from engine.wire.results import Finish
from engine.wire.to_detokenizer import NO_TOKEN
from engine.wire.to_frontend import Ended
from scheduler_proc.answers import Sender
from scheduler_proc.generation import Generation
from scheduler_proc.operation import Operation
from scheduler_proc.outputs import StepRows
from scheduler_proc.overlap import Flight, is_plain, launch, may_plan_ahead
from scheduler_proc.planner import Extend, Planner
from scheduler_proc.request import Request
from scheduler_proc.runner import Runner
from scheduler_proc.sampler import SampledRow, sample, sampled_rows
from scheduler_proc.statistics import Statistics
from scheduler_proc.trials import Trials
from scheduler_proc.vectors import is_finite, vectors_message

logger = logging.getLogger(__name__)

NOT_FINITE = "The vector of this request is not finite: the model's weights or its dtype do not suit it."
OUT_OF_MEMORY = "Out of memory even after retracting all other requests in the decode batch. Aborting the last request."


@dataclass(slots=True)
class Steps:
    """drop: forgets a request, wherever it is, and what it holds. requests: all of the scheduler's.

    eos_ids, original_logprobs, task: as in the settings of the scheduler. queueing: the program, where steps overlap.
    flight: the step that is computed now, where they do.
    """

    planner: Planner
    trials: Trials
    runner: Runner
    backend: Backend
    outbox: Sender
    statistics: Statistics
    operation: Operation
    requests: dict[int, Request]
    generation: Generation
    drop: Callable[[Request], None]
    eos_ids: list[int]
    original_logprobs: bool
    task: Task
    _failed: bool = False
    _short: bool = False
    _room: int | None = None
    queueing: QueueingProgram | None = None
    flight: Flight | None = None
    _taken: float = 0.0

    def step(self, rows: StepRows) -> None:
        """Plan and run one step, and send what it produced together with `rows`; where steps overlap, queue one and
        send what the one before it has produced.

        Raises InvariantError when a failure has left the pool broken, and GroupLostError when one of several ranks
        cannot go on: nothing can be trusted then.
        """
        if self.queueing is not None and self._may_queue() and self._queue_step(rows):
            return
        if self.flight is not None:
            self.collect(rows)
            self.send(rows)
            rows = StepRows()  # a request has one row of a message
        plan = self._plan(rows)
        self.operation.mark("plan")
        if plan:
            self.statistics.begin(plan)
            started, self._room = time.perf_counter(), self.planner.room
            self._short = False
            sampled = self._compute(plan, rows)
            if not self._short:
                self.planner.grow()
            self.statistics.step(plan, sampled, time.perf_counter() - started, self.planner)
        self._end_step(plan, rows)

    def _end_step(self, plan: list[Extend], rows: StepRows) -> None:
        self.trials.end_step()
        self.send(rows)
        self.operation.end_step(plan)
        if self._failed:
            self._failed = False
            self.planner.memory.check(self.planner.running)

    def collect(self, rows: StepRows) -> None:
        """Wait for the step that is computed now, if there is one, and hand out what it made."""
        flight, self.flight = self.flight, None
        if flight is not None:
            self._take(flight, rows)

    def _may_queue(self) -> bool:
        recorder = self.runner.recorder
        recording = recorder is not None and recorder.on
        return not (self.trials.suspects or recording or self.operation.profiler.on) and may_plan_ahead(self.planner)

    def _queue_step(self, rows: StepRows) -> bool:
        """False: nothing is queued or computed, since the next step has to be a step by itself."""
        assert self.queueing is not None
        plan = self._plan(rows)
        if not plan:
            return False
        try:
            if not all(is_plain(step.request) for step in plan):
                self._send_back(plan, [])
                return False
            self.statistics.begin(plan)
            flight = launch(self.queueing, plan, original_logprobs=self.original_logprobs)
        except GroupLostError:
            raise
        except Exception:
            logger.exception("A step cannot be queued; it is computed by itself")
            self._send_back(plan, [])
            return False
        self._store_prefills(plan)
        before, self.flight = self.flight, flight
        if before is not None:
            self._take(before, rows)
        self._end_step(plan, rows)
        return True

    def _take(self, flight: Flight, rows: StepRows) -> None:
        """Wait for a step, and hand out what it made for requests that have not ended meanwhile."""
        made = sampled_rows(flight.outcome(), flight.requests)
        now = time.perf_counter()
        seconds, self._taken = now - max(flight.started, self._taken), now
        live = [
            (request, row)
            for request, row in zip(flight.requests, made, strict=True)
            if self.requests.get(request.key) is request
        ]
        self._emit_all(live, rows)
        self.statistics.step(flight.plan, len(live), seconds, self.planner)

    def send(self, rows: StepRows) -> None:
        """Send rows; should that fail, each by itself, so that only the row that cannot be sent is lost."""
        if not rows.keys:
            return
        try:
            self.outbox.send(rows.message(self.generation.weight_version))
            return
        except Exception:
            logger.exception("The rows of a step cannot be sent together; each is sent by itself")
        for part in rows.single():
            try:
                self.outbox.send(part.message(self.generation.weight_version))
            except Exception as error:
                self.fail(part.requests[0], error, "sending")

    def fail(self, request: Request, error: Exception, doing: str = "computing") -> None:
        """End `request` alone with status 500. It may be running, waiting, or gone from here already."""
        self._end_failed(request, internal_error(logger, doing, request.admit.rid, error))

    def _end_failed(self, request: Request, finish: Finish) -> None:
        self._failed = True
        if self.requests.get(request.key) is request:
            self.drop(request)
        self.outbox.send(Ended(request.key, request.admit.attempt, finish, "scheduler"))

    def _plan(self, rows: StepRows) -> list[Extend]:
        """What is to be computed. A request that cannot be planned ends, and the next step is planned without it."""
        plan: list[Extend] = []
        hopeless: list[Request] = []
        try:
            self.trials.plan(plan, hopeless)
        except Exception as error:
            request = self.planner.at
            if request is None:
                raise
            self._send_back(plan, [])
            plan = []
            if request in self.planner.waiting:
                self.planner.memory.detach(request)
            self.fail(request, error, "planning")
        for request in hopeless:
            del self.requests[request.key]
            rows.add(request, finish=Finish("abort", message=OUT_OF_MEMORY, status=500))
        return plan

    def _compute(self, plan: list[Extend], rows: StepRows, attempts: int = 2) -> int:
        """Run a pass, whatever it takes, and hand out what it made. Returns how many tokens that were."""
        outcome = self._run(plan, attempts)
        if not isinstance(outcome, Exception):
            return self._hand_out(plan, *outcome, rows)
        if isinstance(outcome, MemoryError):
            kept = halved(plan, chunked=self.planner.limits.chunked)
            self._send_back(plan, kept)
            self._short = True
            if kept:
                self.planner.shrink(_size(kept))
                logger.warning("Memory ran out in a step of %d tokens; %d are tried", _size(plan), _size(kept))
                return self._compute(kept, rows)
            logger.error("Request %s ends: there is no memory for it alone", plan[0].request.admit.rid)
            self._end_failed(plan[0].request, Finish("abort", message=OUT_OF_MEMORY, status=500))
            self.planner.room = self._room  # it was this one's doing, and no shortage
            return 0
        if len(plan) > 1:
            logger.warning("The step failed again; each of its %d requests is computed by itself", len(plan))
            return sum(self._compute([step], rows, attempts=1) for step in plan)
        self._send_back(plan, [])
        self.fail(plan[0].request, outcome)
        return 0

    def _run(self, plan: list[Extend], attempts: int) -> tuple[torch.Tensor, list[Request]] | Exception:
        """The pass's logits and whose they are, or what the last attempt raised."""
        while True:
            attempts -= 1
            try:
                return self.runner.run(plan)
            except GroupLostError:
                raise
            except MemoryError as error:
                return error
            except Exception as error:
                if not attempts:
                    return error
                rids = ", ".join(step.request.admit.rid for step in plan)
                logger.exception("A step failed and is computed once more: %s", rids)

    def _send_back(self, plan: list[Extend], kept: list[Extend]) -> None:
        """Give back the slots of what is not computed now: all of `plan` but the tokens of `kept`."""
        counts = {step.request.key: step.count for step in kept}
        for step in plan:
            left = counts.get(step.request.key, 0)
            if left < step.count:
                self.planner.memory.withdraw(step.request, left, step.count - left)

    def _hand_out(self, plan: list[Extend], logits: torch.Tensor, requests: list[Request], rows: StepRows) -> int:
        self.operation.mark("forward")
        if self.task.kind != "generation":
            self._store_prefills(plan)
            self._emit_vectors(requests, logits)
            return 0
        sampled = self._sample(plan, logits, requests)
        self.operation.mark("sample")
        self._store_prefills(plan)
        self._emit_all(sampled, rows)
        return len(sampled)

    def _emit_all(self, sampled: list[tuple[Request, SampledRow]], rows: StepRows) -> None:
        for request, row in sampled:
            try:
                if faults.armed:
                    faults.spring("emit", request.known)
                self._emit(request, row, rows)
            except Exception as error:
                self.fail(request, error, "emitting")

    def _sample(
        self, plan: list[Extend], logits: torch.Tensor, requests: list[Request]
    ) -> list[tuple[Request, SampledRow]]:
        """The requests with their next tokens, without those whose sampling fails."""
        if not requests:
            return []
        try:
            return list(zip(requests, self._sampled(logits, requests), strict=True))
        except GroupLostError:
            raise
        except Exception:
            logger.exception("Sampling a step failed; each of its %d rows is sampled by itself", len(requests))
        sampled = []
        last = dict(zip((step.request.key for step in plan), np.cumsum([step.count for step in plan]) - 1, strict=True))
        for request in requests:
            try:
                # The logits of the attempt that broke off may hold the penalties already.
                logits = self.runner.program.logits(np.array([last[request.key]], np.int64))
                sampled.append((request, self._sampled(logits, [request])[0]))
            except GroupLostError:
                raise
            except Exception as error:
                self.fail(request, error, "sampling")
        return sampled

    def _sampled(self, logits: torch.Tensor, requests: list[Request]) -> list[SampledRow]:
        if faults.armed:
            for request in requests:
                faults.spring("sample", request.known)
        return sample(self.backend, logits, requests, self.eos_ids, original_logprobs=self.original_logprobs)

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
        if request.queued:
            request.queued -= 1
        request.append(row.token)
        finish = self._finish(request, row.token)
        if finish is None:
            rows.add(request, row.token, logprobs=row.logprobs)
        else:
            self._end(request, row.token, finish, rows, row.logprobs)

    def _end(self, request: Request, token: int, finish: Finish, rows: StepRows, logprobs: Any = None) -> None:
        rows.add(request, token, finish, logprobs)
        self.drop(request)

    def _finish(self, request: Request, token: int) -> Finish | None:
        """Whether `token`, the newest, ends the request (contract §6.3, rows 4 and 5)."""
        sampling = request.admit.sampling
        if not sampling.ignore_eos and (token in self.eos_ids or token in sampling.stop_token_ids):
            return Finish("stop", matched=token)
        return _length(request) if request.generated >= request.max_new_tokens else None

    def _emit_vectors(self, requests: list[Request], heads: torch.Tensor) -> None:
        """End the requests whose prompts are computed, row i of `heads` [R, W] being that of requests[i]."""
        if not requests:
            return
        made = heads.cpu().numpy()
        good = [i for i in range(len(requests)) if is_finite(made[i])]
        for i in sorted(set(range(len(requests))) - set(good)):
            self._end_failed(requests[i], Finish("abort", message=NOT_FINITE, status=500))
        parts = [good] if good else []
        for part in parts:
            kept = [requests[i] for i in part]
            try:
                if faults.armed:
                    for request in kept:
                        faults.spring("emit", request.known)
                hidden = self.runner.program.pooled().cpu().numpy()[part]
                message = vectors_message(
                    kept, [made[i] for i in part], hidden, self.task, self.generation.weight_version
                )
                self.outbox.send(message)
            except Exception as error:
                if len(part) > 1:
                    logger.exception("The vectors of a step cannot be sent together; each is sent by itself")
                    parts += [[i] for i in part]
                    continue
                self.fail(kept[0], error, "emitting")
                continue
            for request in kept:
                self.drop(request)


def halved(plan: list[Extend], *, chunked: bool) -> list[Extend]:
    """The first half of a step's tokens; at least its first request. Empty where nothing can be left out.

    chunked: a prompt may be cut.
    """
    room = _size(plan) // 2
    kept: list[Extend] = []
    for step in plan:
        count = step.count if step.count <= room else room if chunked else 0
        if not count:
            break
        kept.append(Extend(step.request, count))
        room -= count
    return kept or (plan[:1] if len(plan) > 1 else [])


def _size(plan: list[Extend]) -> int:
    return sum(step.count for step in plan)


def _length(request: Request) -> Finish:
    return Finish("length", length=request.max_new_tokens)
