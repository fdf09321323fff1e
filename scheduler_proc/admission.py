"""Which requests the scheduler has: taken in or refused, and let go before they are done: aborted, or out of time."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import msgspec
import numpy as np

from engine.config import faults
from engine.config.logs import about
from engine.wire.results import Finish
from engine.wire.to_frontend import Ended
from engine.wire.to_scheduler import Admit
from scheduler_proc.admissible import check_admissible
from scheduler_proc.answers import Sender
from scheduler_proc.generation import Generation
from scheduler_proc.outputs import StepRows
from scheduler_proc.planner import Planner
from scheduler_proc.request import Request, new_request
from scheduler_proc.settings import SchedulerSettings
from scheduler_proc.trials import Trials

logger = logging.getLogger(__name__)

NO_PRIORITY = "Using priority is disabled for this server. Please send a new request without a priority."
QUEUE_FULL = "The request queue is full."
OUTRANKED = "The request is aborted by a higher priority request."


@dataclass(slots=True)
class Admission:
    """requests: all of the scheduler's, by their keys. arrivals: so many have been admitted."""

    settings: SchedulerSettings
    planner: Planner
    requests: dict[int, Request]
    outbox: Sender
    generation: Generation
    trials: Trials
    arrivals: int = 0

    def admit(self, admit: Admit) -> None:
        """Put a request into the queue, or refuse it. Raises ValueError for a message that makes no sense."""
        older = self.requests.get(admit.key)
        if older is not None:
            if admit.attempt <= older.admit.attempt:
                return  # it was still on its way when it was replayed
            self.drop(older)
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

    def abort(self, keys: list[int], rows: StepRows) -> None:
        """End requests whose clients want no more of them; into `rows` go those that may have produced something."""
        for request in [self.requests[key] for key in dict.fromkeys(keys) if key in self.requests]:
            if not request.delivered and request not in self.planner.running:
                self._end_waiting(request, Finish("abort", message="Abort in waiting queue"))
            else:
                self.drop(request)
                rows.add(request, finish=Finish("abort", message="Aborted"))

    def _end_waiting(self, request: Request, finish: Finish) -> None:
        """End a request that has produced nothing yet."""
        self.drop(request)
        self.outbox.send(Ended(request.key, request.admit.attempt, finish, "scheduler"))

    def drop(self, request: Request) -> None:
        """Forget a request, wherever it is."""
        del self.requests[request.key]
        if logger.isEnabledFor(logging.DEBUG):
            rid = request.admit.rid
            logger.debug("request %s leaves after %d new tokens", rid, request.generated, extra=about(rid))
        if request in self.planner.running:
            self.planner.finish(request)
        else:
            self.planner.unqueue(request)

    def expire(self, rows: StepRows) -> None:
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
                    self.drop(request)
                    message = "Request running timeout reached."
                    rows.add(request, finish=Finish("abort", message=message, status=503))
