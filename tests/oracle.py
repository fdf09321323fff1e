"""`transformers` in float32 as the judge of greedy outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

NEAR_TIE = 0.02
"""Two logits this close may come out in either order: the order of float32 sums is not fixed across libraries."""
TOLERANCE = 1e-3
"""How far a logprob may be off."""


@torch.inference_mode()
def reference_logprobs(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Log-softmax of `model` (a transformers causal LM) at every position of `tokens`: float32 [len(tokens), V]."""
    logits = model(torch.tensor([list(tokens)])).logits[0].float()
    return torch.log_softmax(logits, dim=-1)


def check_greedy(model: Any, prompt: Sequence[int], output: Sequence[int], logprobs: Sequence[float] | None) -> int:
    """Assert that `output` is what `model` would generate greedily after `prompt`, token for token.

    A token may differ only where the oracle itself sees a near tie. Judging each token after the output so far is
    the same as comparing with a greedy run, and goes on after an excused tie. Returns the number of excused ties.
    """
    expected = reference_logprobs(model, [*prompt, *output])[len(prompt) - 1 : -1]
    excused = 0
    for i, token in enumerate(output):
        best = int(expected[i].argmax())
        if token != best:
            margin = float(expected[i, best] - expected[i, token])
            assert margin < NEAR_TIE, f"token {i}: {token}, the oracle says {best} by a margin of {margin:.3f}"
            excused += 1
        if logprobs is not None:
            assert abs(logprobs[i] - float(expected[i, token])) < TOLERANCE, f"logprob of token {i}"
    return excused
