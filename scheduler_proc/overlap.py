"""A step of overlap: a step is planned and queued while the device computes the one before, whose tokens the device
feeds in itself.

So a request may have tokens that the host does not know yet (`Request.queued`). A step that ends a request is read when
the next one is queued already, and samples a token too many, which nobody sees. Slots of tokens that will never be
known are given back at once: the device works in the order of the queue, so the next owner writes them later.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.config import faults
from engine.kernels.queued import Outcome, QueueingProgram
from scheduler_proc.planner import Extend, Planner
from scheduler_proc.request import Request
from scheduler_proc.runner import ragged_batch
from scheduler_proc.sampler import is_adjusted, wanted_draws, wanted_scores


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that is computed now. requests: row i of its outcome is of requests[i]."""

    plan: list[Extend]
    requests: list[Request]
    outcome: Callable[[], Outcome]
    started: float


def launch(program: QueueingProgram, plan: list[Extend], *, original_logprobs: bool) -> Flight:
    """Queue a step; its requests count as computed so far. When it raises, nothing has changed."""
    batch = ragged_batch(plan)
    sources = np.full(batch.num_tokens, -1, np.int64)
    for i, step in enumerate(plan):
        request = step.request
        if request.computed + step.count > request.length:  # its last token is still on the device
            sources[batch.query_starts[i + 1] - 1] = request.row
    batch.token_ids[np.flatnonzero(sources >= 0)] = 0
    completed = [(i, step.request) for i, step in enumerate(plan) if step.completes]
    requests = [request for _, request in completed]
    rows = np.array([batch.query_starts[i + 1] - 1 for i, _ in completed], np.int64)
    scores = wanted_scores(requests, original_logprobs=original_logprobs)
    started = time.perf_counter()
    outcome = program.queue(batch, rows, sources, wanted_draws(requests), scores)
    for step in plan:
        step.request.computed += step.count
    for row, request in enumerate(requests):
        request.row = row
        request.queued += 1
    return Flight(plan, requests, outcome, started)


def is_plain(request: Request) -> bool:
    """Whether its next token follows from its logits and columns alone, and nothing else is wanted of its step."""
    admit = request.admit
    return not is_adjusted(request) and request.prompt_logprobs is None and admit.vector is None


def may_plan_ahead(planner: Planner) -> bool:
    """Whether a plan can be made without sending a request back, of which a token might not be known yet."""
    if faults.armed or planner.room is not None:
        return False
    return planner.memory.available >= sum(request.outstanding for request in planner.running)
