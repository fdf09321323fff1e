"""Logprobs of the prompt's own tokens, from the logits of the positions before them."""

from __future__ import annotations

import torch

from engine.wire.results import FLOAT32_MIN
from scheduler_proc.ranking import best_ids
from scheduler_proc.request import Request
from scheduler_proc.sampler import scored


def record(request: Request, position: int, logits: torch.Tensor) -> None:
    """Add the entries that rows `position`, `position + 1`, ... of `logits` [R, V] give.

    Row p says how likely prompt token p + 1 was. Raw logits: no temperature, no penalties (contract §7.3).
    """
    wanted, entries = request.admit.logprobs, request.prompt_logprobs
    assert wanted is not None and entries is not None and entries.next_row() == position
    logprobs = torch.log_softmax(logits, dim=-1)
    rows = logprobs.shape[0]
    targets = torch.from_numpy(request.tokens[position + 1 : position + 1 + rows].astype("int64"))
    values = torch.gather(logprobs, 1, targets[:, None]).squeeze(1).clamp(min=FLOAT32_MIN)
    entries.tokens.extend(zip(values.tolist(), targets.tolist(), strict=True))
    if entries.top is not None:
        entries.top.extend(scored(row, best_ids(row, wanted.top)) for row in logprobs)
    if entries.ids is not None:
        ids = torch.tensor(wanted.ids, dtype=torch.int64)
        entries.ids.extend(scored(row, ids) for row in logprobs)
