"""Sampling: the steps of contract §6.2, in their order. Each row is sampled by itself, so that a request's tokens
do not depend on its company; the draw is a function of (seed, position)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.kernels.noise import uniforms
from engine.wire.results import FLOAT32_MIN, Scored, TokenLogprobs
from engine.wire.sampling import LogprobOptions, Sampling
from scheduler_proc.ranking import best_ids
from scheduler_proc.request import Request

GREEDY_BELOW = 1e-6
"""A temperature under this means argmax."""

Weights = NDArray[Any]

_BLOCK = 256

_LARGEST = float(torch.finfo(torch.float32).max)

_FIRST_NUCLEUS = 256
"""How many of the most likely tokens are ranked at first, in the hope that top_p ends among them."""


@dataclass(frozen=True, slots=True)
class SampledRow:
    """The next token of a row, or None where the logits are not finite; its logprobs if the request wants them."""

    token: int | None
    logprobs: TokenLogprobs | None


@torch.inference_mode()
def sample(
    logits: torch.Tensor, requests: list[Request], eos_ids: list[int], *, original_logprobs: bool
) -> list[SampledRow]:
    """Sample the next token of each request.

    logits: float32 [R, V], row i of requests[i]; overwritten where penalties or biases apply.
    original_logprobs: report logprobs before temperature (else after it).
    """
    for row, request in enumerate(requests):
        adjust(logits[row], request, eos_ids)
    best = torch.argmax(logits, dim=-1)
    peaks = torch.gather(logits, 1, best[:, None]).squeeze(1)
    finite = torch.isfinite(peaks).tolist()
    greedy = best.tolist()
    draws = uniforms(
        np.array([r.admit.sampling.seed & (2**64 - 1) for r in requests], np.uint64),
        np.array([r.length for r in requests], np.int64),
    )
    rows: list[SampledRow] = []
    for row, request in enumerate(requests):
        if not finite[row]:
            rows.append(SampledRow(None, None))
            continue
        sampling = request.admit.sampling
        if sampling.temperature < GREEDY_BELOW:
            token = greedy[row]
        else:
            token = draw(logits[row], sampling, float(draws[row]))
        logprobs = None
        if request.admit.logprobs is not None:
            scale = 1.0 if original_logprobs else sampling.temperature
            logprobs = output_logprobs(logits[row], token, scale, request.admit.logprobs)
        rows.append(SampledRow(token, logprobs))
    return rows


def adjust(row: torch.Tensor, request: Request, eos_ids: list[int]) -> None:
    """Steps 1 to 4 on one row of logits [V], in place: minimum length, penalties, logit bias.

    The sums are float64 and the results float32 below infinity: a bias of 1e300 forces its token, and is no NaN.
    """
    sampling = request.admit.sampling
    if request.generated < request.min_new_tokens:
        # Clients may name stop ids that the vocabulary does not have: those cannot come anyway.
        row[[token for token in eos_ids + sampling.stop_token_ids if 0 <= token < len(row)]] = -torch.inf
    if request.output_counts:
        ids = torch.tensor(list(request.output_counts), dtype=torch.int64)
        counts = torch.tensor(list(request.output_counts.values()), dtype=torch.float64)
        z = row[ids].double() - sampling.frequency_penalty * counts - sampling.presence_penalty
        penalty = sampling.repetition_penalty
        row[ids] = torch.where(z < 0, z * penalty, z / penalty).clamp(max=_LARGEST).float()
    if sampling.logit_bias:
        ids = torch.tensor([int(key) for key in sampling.logit_bias], dtype=torch.int64)
        bias = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float64)
        row[ids] = (row[ids].double() + bias).clamp(max=_LARGEST).float()


def draw(row: torch.Tensor, sampling: Sampling, uniform: float) -> int:
    """Steps 7 to 11 on one row of logits [V]: the token at `uniform` in [0, 1) of the filtered distribution.

    In numpy, whose ops on one row cost no barrier between threads.
    """
    z = row.numpy()
    with np.errstate(over="ignore"):  # far below the largest is as good as minus infinity
        weights = np.exp((z - z.max()) / np.float32(min(sampling.temperature, _LARGEST)))  # softmax times its sum
    ids: Weights | None = None
    if sampling.top_k != -1 or sampling.top_p < 1.0:
        ids = _nucleus(weights, sampling)
        kept = weights[ids]
    else:
        kept = weights
    if sampling.min_p > 0.0:
        kept = np.where(kept >= np.float32(sampling.min_p), kept, np.float32(0.0))  # the largest weight is 1
    index = _locate(kept, uniform)
    return index if ids is None else int(ids[index])


def _locate(weights: Weights, uniform: float) -> int:
    """Index of the weight in which `uniform` of their sum falls; never one that is 0.

    Sums of blocks first, then within one block: a running sum over a whole vocabulary takes ten times as long.
    """
    starts = np.arange(0, len(weights), _BLOCK)
    blocks = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    target = uniform * blocks[-1]
    block = int(np.searchsorted(blocks, target, side="right"))
    if block < len(blocks):
        before = blocks[block - 1] if block else 0.0
        inside = weights[starts[block] : starts[block] + _BLOCK]
        offset = int(np.searchsorted(np.cumsum(inside, dtype=np.float64) + before, target, side="right"))
        if offset < len(inside) and inside[offset] > 0:
            return int(starts[block]) + offset
    # Rounding has put the target beyond the last sum of its block: the nearest weight before it is the one meant.
    end = len(weights) if block == len(blocks) else int(starts[block]) + _BLOCK
    return int(np.flatnonzero(weights[:end])[-1])


def _cooled(row: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits [V] over `temperature`, less a constant that softmax does not see: the largest is 0, none is infinite."""
    return (row - row.max()) / min(temperature, _LARGEST)


def _nucleus(weights: Weights, sampling: Sampling) -> Weights:
    """Ids of the tokens that top_k and top_p leave, most likely first (int64)."""
    limit = len(weights) if sampling.top_k == -1 else min(sampling.top_k, len(weights))
    total = float(np.sum(weights, dtype=np.float64))
    count = min(limit, _FIRST_NUCLEUS)
    while True:
        ids = best_ids(torch.from_numpy(weights), count).numpy()
        kept = weights[ids] / total
        inside = np.cumsum(kept) - kept <= sampling.top_p
        if count == limit or not inside[-1]:
            return ids[inside]
        count = min(limit, count * 8)


def output_logprobs(row: torch.Tensor, token: int | None, temperature: float, wanted: LogprobOptions) -> TokenLogprobs:
    """The logprobs of one output position from its adjusted logits [V]."""
    if temperature >= GREEDY_BELOW and temperature != 1.0:
        row = _cooled(row, temperature)
    logprobs = torch.log_softmax(row, dim=-1)
    return TokenLogprobs(
        logprob=None if token is None else _finite(float(logprobs[token])),
        top=scored(logprobs, best_ids(logprobs, wanted.top)) if wanted.top else None,
        ids=scored(logprobs, torch.tensor(wanted.ids, dtype=torch.int64)) if wanted.ids else None,
    )


def scored(logprobs: torch.Tensor, ids: torch.Tensor) -> list[Scored]:
    """(logprob, id) of each of `ids`, minus infinity as the smallest float32."""
    return [(_finite(value), token) for value, token in zip(logprobs[ids].tolist(), ids.tolist(), strict=True)]


def _finite(logprob: float) -> float:
    return max(logprob, FLOAT32_MIN)
