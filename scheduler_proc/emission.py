"""What a step has made, handed out: tokens and vectors, and the ends of requests, also of those that have failed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from engine.checkpoints.task import Task
from engine.config import faults
from engine.wire.failures import internal_error
from engine.wire.results import Finish
from engine.wire.to_detokenizer import NO_TOKEN
from engine.wire.to_frontend import Ended
from scheduler_proc.answers import Sender
from scheduler_proc.generation import Generation
from scheduler_proc.outputs import StepRows
from scheduler_proc.request import Request
from scheduler_proc.sampler import SampledRow
from scheduler_proc.vectors import is_finite, vectors_message

logger = logging.getLogger(__name__)

NOT_FINITE = "The vector of this request is not finite: the model's weights or its dtype do not suit it."


@dataclass(slots=True)
class Emission:
    """drop: forgets a request, wherever it is, and what it holds. requests: all of the scheduler's.

    eos_ids, task: as in the settings of the scheduler. failed: a request has ended because of a failure; whoever
    looks after that sets it back.
    """

    outbox: Sender
    requests: dict[int, Request]
    generation: Generation
    drop: Callable[[Request], None]
    eos_ids: list[int]
    task: Task
    failed: bool = False

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
        self.end_failed(request, internal_error(logger, doing, request.admit.rid, error))

    def end_failed(self, request: Request, finish: Finish) -> None:
        """End `request` alone as `finish` says, wherever it is."""
        self.failed = True
        if self.requests.get(request.key) is request:
            self.drop(request)
        self.outbox.send(Ended(request.key, request.admit.attempt, finish, "scheduler"))

    def emit(self, sampled: list[tuple[Request, SampledRow]], rows: StepRows) -> None:
        """Take sampled tokens into their requests and into `rows`; one that fails ends its request alone."""
        for request, row in sampled:
            try:
                if faults.armed:
                    faults.spring("emit", request.known)
                self._take_in(request, row, rows)
            except Exception as error:
                self.fail(request, error, "emitting")

    def _take_in(self, request: Request, row: SampledRow, rows: StepRows) -> None:
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

    def emit_vectors(self, requests: list[Request], heads: torch.Tensor, pooled: Callable[[], torch.Tensor]) -> None:
        """End the requests whose prompts are computed, row i of `heads` [R, W] being that of requests[i].
        pooled: gives their vectors."""
        if not requests:
            return
        made = heads.cpu().numpy()
        good = [i for i in range(len(requests)) if is_finite(made[i])]
        for i in sorted(set(range(len(requests))) - set(good)):
            self.end_failed(requests[i], Finish("abort", message=NOT_FINITE, status=500))
        parts = [good] if good else []
        for part in parts:
            kept = [requests[i] for i in part]
            try:
                if faults.armed:
                    for request in kept:
                        faults.spring("emit", request.known)
                hidden = pooled().cpu().numpy()[part]
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


def _length(request: Request) -> Finish:
    return Finish("length", length=request.max_new_tokens)
