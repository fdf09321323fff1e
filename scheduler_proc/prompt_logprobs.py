"""Logprobs of the prompt's own tokens, from the logits of the positions before them."""

from __future__ import annotations

import torch

from engine.kernels.table import Backend
from scheduler_proc.request import Request
from scheduler_proc.sampler import output_logprobs


def record(backend: Backend, request: Request, position: int, logits: torch.Tensor) -> None:
    """Add the entries that rows `position`, `position + 1`, ... of `logits` [R, V] give.

    Row p says how likely prompt token p + 1 was. Raw logits: no temperature, no penalties (contract §7.3).
    """
    wanted, entries = request.admit.logprobs, request.prompt_logprobs
    assert wanted is not None and entries is not None and entries.next_row() == position
    count = len(logits)
    targets = request.tokens[position + 1 : position + 1 + count].tolist()
    found = output_logprobs(backend, logits, range(count), targets, [1.0] * count, [wanted] * count)
    entries.tokens.extend((entry.logprob, target) for entry, target in zip(found, targets, strict=True))
    if entries.top is not None:
        entries.top.extend(entry.top for entry in found)
    if entries.ids is not None:
        entries.ids.extend(entry.ids for entry in found)
