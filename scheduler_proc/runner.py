"""From a plan to logits: one step's flat arrays, one call of the model, logits for the rows that need them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from engine.config import faults
from engine.kernels.batch import RaggedBatch
from engine.kernels.table import Backend, Program
from scheduler_proc.planner import Extend
from scheduler_proc.prompt_logprobs import record
from scheduler_proc.recorder import Recorder
from scheduler_proc.request import Request
from scheduler_proc.sampler import wanted_logits

logger = logging.getLogger(__name__)

NO_ROWS = np.empty(0, np.int64)
HEAD_ROWS = 128
"""Rows of logits that are computed at once for prompt logprobs (each is a vocabulary wide)."""


@dataclass(frozen=True, slots=True)
class Runner:
    """The model's step over its KV pool. backend: the program's, for the logprobs of prompts. recorder: None where none
    was asked for. divided: the logits come from several ranks, and those that nobody looks at need not be fetched."""

    program: Program
    backend: Backend
    recorder: Recorder | None = None
    divided: bool = False

    def run(self, plan: list[Extend]) -> tuple[torch.Tensor, list[Request]]:
        """Compute one step: KV of every planned token, prompt logprobs where wanted.

        Returns float32 logits [R, V] for the R requests whose next token can be sampled, and these requests. The
        logits may be overwritten, and are valid until the next step. When it raises it may be called again: no
        request has come further, but for the prompt logprobs that it has already.
        """
        if faults.armed:
            for step in plan:
                faults.spring("allocate", step.request.known)
        batch = ragged_batch(plan)
        sampled = [step.request for step in plan if step.completes]
        ends = [batch.query_starts[i + 1] - 1 for i, step in enumerate(plan) if step.completes]
        rows = np.array(ends, np.int64)
        if all(step.request.prompt_logprobs is None for step in plan):
            keep = wanted_logits(sampled) if self.divided else None
            logits = self.program.run(batch, rows) if keep is None else self.program.run(batch, rows, keep)
        else:
            self.program.run(batch, NO_ROWS)
            self._prompt_logprobs(plan, batch)
            logits = self.program.logits(rows)
        if faults.armed:
            for step in plan:
                faults.spring("forward", step.request.known)
        if self.recorder is not None:
            self.recorder.note(batch, self.program.routing)
        for step in plan:
            step.request.computed += step.count
        return logits, sampled

    def _prompt_logprobs(self, plan: list[Extend], batch: RaggedBatch) -> None:
        for i, step in enumerate(plan):
            request = step.request
            if request.prompt_logprobs is None:
                continue
            first = max(request.prompt_logprobs.next_row(), request.computed)
            last = min(request.computed + step.count, request.prompt_length - 1)
            base = batch.query_starts[i] - request.computed
            for start in range(first, last, HEAD_ROWS):
                rows = np.arange(base + start, base + min(start + HEAD_ROWS, last))
                record(self.backend, request, start, self.program.logits(rows))


def ragged_batch(plan: list[Extend]) -> RaggedBatch:
    """Lay the planned tokens end to end, with the slots of each request's whole context."""
    counts = [step.count for step in plan]
    ends = [step.request.computed + step.count for step in plan]
    query_starts = (0, *np.cumsum(counts).tolist())
    context_starts = (0, *np.cumsum(ends).tolist())
    tokens = np.empty(query_starts[-1], np.int64)
    positions = np.empty(query_starts[-1], np.int64)
    slots = np.empty(query_starts[-1], np.int64)
    context = np.empty(context_starts[-1], np.int64)
    type_ids: NDArray[np.int64] | None = None
    for i, step in enumerate(plan):
        request, start, end = step.request, step.request.computed, ends[i]
        here = slice(query_starts[i], query_starts[i + 1])
        tokens[here] = request.tokens[start:end]
        positions[here] = np.arange(start, end)
        slots[here] = request.slots[start:end]
        context[context_starts[i] : context_starts[i + 1]] = request.slots[:end]
        if request.admit.vector is not None and request.admit.vector.type_ids:
            if type_ids is None:
                type_ids = np.zeros(query_starts[-1], np.int64)
            type_ids[here] = np.frombuffer(request.admit.vector.type_ids, np.uint8)[start:end]
    return RaggedBatch(
        token_ids=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots),
        query_starts=query_starts,
        context_lengths=tuple(ends),
        context_slots=torch.from_numpy(context),
        context_starts=context_starts,
        type_ids=None if type_ids is None else torch.from_numpy(type_ids),
    )
