"""Sampling: the steps of contract §6.2, in their order. Each row is sampled by itself, so that a request's tokens
do not depend on its company; the draw is a function of (seed, position).

What walks over a whole vocabulary is the backend's: a step calls it once for the best ids, once for the rows that are
drawn, and once for logprobs. A greedy row with no penalty, mask or bias costs nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import torch

from engine.kernels.noise import uniforms
from engine.kernels.queued import Draws, Outcome, Scores
from engine.kernels.table import Backend, Floats, Logprobs, Longs
from engine.wire.results import FLOAT32_MIN, Scored, TokenLogprobs
from engine.wire.sampling import LogprobOptions
from scheduler_proc.constraint import GrammarError
from scheduler_proc.request import Request

GREEDY_BELOW = 1e-6
"""A temperature under this means argmax."""
MOST_WANTED = 256
"""From so many on all of them are as quickly had."""

_MOST_RANKS = 2**31 - 1
_LARGEST = float(torch.finfo(torch.float32).max)


class SampledRow(msgspec.Struct, frozen=True, gc=False):
    """The next token of a row, or None where the logits are not finite; its logprobs if the request wants them."""

    token: int | None
    logprobs: TokenLogprobs | None = None


def sample(
    backend: Backend, logits: torch.Tensor, requests: list[Request], eos_ids: list[int], *, original_logprobs: bool
) -> list[SampledRow]:
    """Sample the next token of each request.

    logits: float32 [R, V], row i of requests[i]; overwritten where penalties or biases apply.
    original_logprobs: report logprobs before temperature (else after it).
    """
    adjusted = [row for row, request in enumerate(requests) if is_adjusted(request)]
    if adjusted:
        with torch.inference_mode():
            for row in adjusted:
                adjust(logits[row], requests[row], eos_ids)
    best, peaks = backend.best(logits)
    tokens: list[int | None] = best.tolist()
    for row in np.flatnonzero(~np.isfinite(peaks)).tolist():
        tokens[row] = None
    drawn = [
        row
        for row, request in enumerate(requests)
        if request.admit.sampling.temperature >= GREEDY_BELOW and tokens[row] is not None
    ]
    if drawn:
        for row, token in zip(drawn, _draw(backend, logits, requests, drawn), strict=True):
            tokens[row] = token
    scored = [
        (row, token, request.admit.logprobs)
        for row, (token, request) in enumerate(zip(tokens, requests, strict=True))
        if token is not None and request.admit.logprobs is not None
    ]
    rows = [SampledRow(token) for token in tokens]
    if scored:
        at, chosen, wanted = zip(*scored, strict=True)
        temperatures = [1.0 if original_logprobs else _scale(requests[row]) for row in at]
        for row, entry in zip(at, output_logprobs(backend, logits, at, chosen, temperatures, wanted), strict=True):
            rows[row] = SampledRow(tokens[row], entry)
    return rows


def wanted_logits(requests: list[Request]) -> Longs:
    """Of each request how many of its largest logits `sample` looks at: int64 [R], -1 for all of them."""
    return np.array([_wanted(request) for request in requests], np.int64)


def _wanted(request: Request) -> int:
    sampling = request.admit.sampling
    if request.admit.logprobs is not None or is_adjusted(request):
        return -1
    if sampling.temperature < GREEDY_BELOW:
        return 1
    # The others' weights count where top_p is a share of all of them.
    return sampling.top_k if 0 < sampling.top_k < MOST_WANTED and sampling.top_p >= 1.0 else -1


def is_adjusted(request: Request) -> bool:
    return bool(
        request.output_counts
        or request.constraint is not None
        or request.admit.sampling.logit_bias
        or (request.min_new_tokens and request.generated < request.min_new_tokens)
    )


def adjust(row: torch.Tensor, request: Request, eos_ids: list[int]) -> None:
    """Steps 1 to 4 on one row of logits [V], in place: minimum length, penalties, grammar, logit bias.

    The sums are float64 and the results float32 below infinity: a bias of 1e300 forces its token, and is no NaN.
    A grammar that is complete ends a request before its minimum length: nothing but the end may come.
    Raises GrammarError where the grammar cannot be followed.
    """
    sampling, constraint = request.admit.sampling, request.constraint
    complete = constraint is not None and constraint.complete
    too_short = request.generated < request.min_new_tokens and not complete
    if too_short:
        # Clients may name stop ids that the vocabulary does not have: those cannot come anyway.
        row[[token for token in eos_ids + sampling.stop_token_ids if 0 <= token < len(row)]] = -torch.inf
    if request.output_counts:
        ids = torch.tensor(list(request.output_counts), dtype=torch.int64, device=row.device)
        counts = torch.tensor(list(request.output_counts.values()), dtype=torch.float64, device=row.device)
        z = row[ids].double() - sampling.frequency_penalty * counts - sampling.presence_penalty
        penalty = sampling.repetition_penalty
        row[ids] = torch.where(z < 0, z * penalty, z / penalty).clamp(max=_LARGEST).float()
    if constraint is not None:
        row.masked_fill_(torch.from_numpy(constraint.forbidden()).to(row.device), -torch.inf)
        if too_short and bool((row == -torch.inf).all()):
            raise GrammarError(
                f"The grammar allows nothing but an end after {request.generated} tokens; min_new_tokens is "
                f"{request.min_new_tokens}"
            )
    if sampling.logit_bias:
        ids = torch.tensor([int(key) for key in sampling.logit_bias], dtype=torch.int64, device=row.device)
        bias = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float64, device=row.device)
        row[ids] = (row[ids].double() + bias).clamp(max=_LARGEST).float()


def wanted_draws(requests: list[Request], rows: list[int] | None = None) -> Draws | None:
    """Steps 7 to 11 for `rows`, none of them greedy; None: for all that are not. None where nothing is drawn."""
    if rows is None:
        rows = [row for row, r in enumerate(requests) if r.admit.sampling.temperature >= GREEDY_BELOW]
    if not rows:
        return None
    drawn = [requests[row] for row in rows]
    sampling = [request.admit.sampling for request in drawn]
    return Draws(
        rows=np.array(rows, np.int64),
        temperatures=np.array([s.temperature for s in sampling], np.float64),
        # A client may ask for more than any integer type holds.
        top_ks=np.array([min(s.top_k, _MOST_RANKS) for s in sampling], np.int64),
        top_ps=np.array([s.top_p for s in sampling], np.float64),
        min_ps=np.array([s.min_p for s in sampling], np.float64),
        uniforms=uniforms(
            np.array([s.seed & (2**64 - 1) for s in sampling], np.uint64),
            np.array([request.length + request.queued for request in drawn], np.int64),
        ),
    )


def _draw(backend: Backend, logits: torch.Tensor, requests: list[Request], rows: list[int]) -> list[int]:
    draws = wanted_draws(requests, rows)
    assert draws is not None
    return backend.draw(
        logits, draws.rows, draws.temperatures, draws.top_ks, draws.top_ps, draws.min_ps, draws.uniforms
    ).tolist()


def wanted_scores(requests: list[Request], *, original_logprobs: bool) -> Scores | None:
    """The logprobs that are wanted of the tokens to be sampled; None: none are."""
    rows = [row for row, request in enumerate(requests) if request.admit.logprobs is not None]
    wanted = [options for request in requests if (options := request.admit.logprobs) is not None]
    if not rows:
        return None
    return Scores(
        rows=np.array(rows, np.int64),
        temperatures=np.array([1.0 if original_logprobs else _scale(requests[row]) for row in rows], np.float64),
        tops=np.array([options.top for options in wanted], np.int64),
        id_counts=np.array([len(options.ids) for options in wanted], np.int64),
        ids=np.array([token for options in wanted for token in options.ids], np.int64),
    )


def sampled_rows(outcome: Outcome, requests: list[Request]) -> list[SampledRow]:
    """The rows of a step that was queued."""
    wanted = [options for request in requests if (options := request.admit.logprobs) is not None]
    entries = iter(_entries(outcome.logprobs, wanted, outcome.width) if outcome.logprobs is not None else [])
    rows = []
    for token, finite, request in zip(outcome.tokens.tolist(), np.isfinite(outcome.peaks), requests, strict=True):
        entry = None if request.admit.logprobs is None else next(entries)
        rows.append(SampledRow(token, entry) if finite else SampledRow(None))
    return rows


def _scale(request: Request) -> float:
    """The temperature of a request's logprobs: that of its draws, 1 where it does not draw."""
    temperature = request.admit.sampling.temperature
    return temperature if temperature >= GREEDY_BELOW else 1.0


def output_logprobs(
    backend: Backend,
    logits: torch.Tensor,
    rows: Sequence[int],
    tokens: Sequence[int],
    temperatures: Sequence[float],
    wanted: Sequence[LogprobOptions],
) -> list[TokenLogprobs]:
    """The logprobs of some rows of adjusted logits [R, V]: of the token of each, and what else is wanted of it.

    Minus infinity comes as the smallest float32.
    """
    size = logits.shape[1]
    tops = [min(options.top, size) for options in wanted]
    found = backend.logprobs(
        logits,
        np.array(rows, np.int64),
        np.array(temperatures, np.float64),
        np.array(tokens, np.int64),
        np.array(tops, np.int64),
        np.array([len(options.ids) for options in wanted], np.int64),
        np.array([token for options in wanted for token in options.ids], np.int64),
    )
    return _entries(found, wanted, size)


def _entries(found: Logprobs, wanted: Sequence[LogprobOptions], width: int) -> list[TokenLogprobs]:
    tops = [min(options.top, width) for options in wanted]
    top = _scored(found.tops, found.top_ids)
    ids = _finite(found.ids)
    entries = []
    top_start = id_start = 0
    for value, options, count in zip(_finite(found.tokens), wanted, tops, strict=True):
        top_end, id_end = top_start + count, id_start + len(options.ids)
        entries.append(
            TokenLogprobs(
                logprob=value,
                top=top[top_start:top_end] if options.top else None,
                ids=list(zip(ids[id_start:id_end], options.ids, strict=True)) if options.ids else None,
            )
        )
        top_start, id_start = top_end, id_end
    return entries


def _scored(logprobs: Floats, ids: Longs) -> list[Scored]:
    return list(zip(_finite(logprobs), ids.tolist(), strict=True))


def _finite(logprobs: Floats) -> list[float]:
    return np.maximum(logprobs, np.float32(FLOAT32_MIN)).tolist()
