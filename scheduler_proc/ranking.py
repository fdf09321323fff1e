"""The most likely tokens of a row, in an order that does not depend on how they were found."""

from __future__ import annotations

import torch


def best_ids(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Ids of the `count` largest of `scores` [V], largest first, the lower id first among equals: int64 [count].

    `torch.topk` and `torch.sort` leave the order of equals open, so it is fixed here: the draw and the
    logprobs of a request must be the same in any company.
    """
    count = min(count, scores.shape[0])
    if count <= 0:
        return torch.empty(0, dtype=torch.int64)
    if count < scores.shape[0]:
        threshold = torch.topk(scores, count, sorted=False).values.min()
        ids = torch.nonzero(scores >= threshold).squeeze(1)
    else:
        ids = torch.arange(scores.shape[0])
    order = torch.sort(scores[ids], descending=True, stable=True).indices
    return ids[order[:count]]
