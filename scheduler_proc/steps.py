"""One step: planned, computed, sampled and handed out, with each failure kept to the request that causes it.

A forward pass that fails is run once more: a passing fault costs nothing. When it fails again, each of its requests is
computed by itself, so that only the culprit ends. What a failed pass has written into the KV pool is written anew by
the next one, or its slots are given back: nothing of it is ever shared. Where memory ran out, the pass is cut in half.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import numpy as np
import torch

from engine.checkpoints.task import Task
from engine.config import faults
from engine.kernels.queued import QueueingProgram
from engine.kernels.table import Backend
from engine.parallel.group import GroupLostError
from engine.wire.results import Finish
from scheduler_proc.emission import Emission
from scheduler_proc.operation import Operation
from scheduler_proc.outputs import StepRows
from scheduler_proc.overlap import Flight, is_plain, launch, may_plan_ahead
from scheduler_proc.planner import Extend, Planner
from scheduler_proc.request import Request
from scheduler_proc.runner import Runner
from scheduler_proc.sampler import SampledRow, sample, sampled_rows
from scheduler_proc.statistics import Statistics
from scheduler_proc.trials import Trials

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = "Out of memory even after retracting all other requests in the decode batch. Aborting the last request."


@dataclass(slots=True)
class Steps:
    """requests: all of the scheduler's. eos_ids, original_logprobs, task: as in the settings of the scheduler.

    queueing: the program, where steps overlap. flight: the step that is computed now, where they do.
    """

    planner: Planner
    trials: Trials
    runner: Runner
    backend: Backend
    statistics: Statistics
    operation: Operation
    requests: dict[int, Request]
    emission: Emission
    eos_ids: list[int]
    original_logprobs: bool
    task: Task
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
            self.emission.send(rows)
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
        self.emission.send(rows)
        self.operation.end_step(plan)
        if self.emission.failed:
            self.emission.failed = False
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
        self.emission.emit(live, rows)
        self.statistics.step(flight.plan, len(live), seconds, self.planner)

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
            self.emission.fail(request, error, "planning")
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
            self.emission.end_failed(plan[0].request, Finish("abort", message=OUT_OF_MEMORY, status=500))
            self.planner.room = self._room  # it was this one's doing, and no shortage
            return 0
        if len(plan) > 1:
            logger.warning("The step failed again; each of its %d requests is computed by itself", len(plan))
            return sum(self._compute([step], rows, attempts=1) for step in plan)
        self._send_back(plan, [])
        self.emission.fail(plan[0].request, outcome)
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
            self.emission.emit_vectors(requests, logits, self.runner.program.pooled)
            return 0
        sampled = self._sample(plan, logits, requests)
        self.operation.mark("sample")
        self._store_prefills(plan)
        self.emission.emit(sampled, rows)
        return len(sampled)

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
                self.emission.fail(request, error, "sampling")
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
