"""From the times of answers to the figures of a row."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec
import numpy as np

from engine.bench.http_client import Generation
from engine.bench.load import Round
from engine.bench.workload import Work


class Spread(msgspec.Struct, frozen=True):
    """Of a number of times, in milliseconds."""

    mean: float
    p50: float
    p99: float


class RoundFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One round. Rates are a second of `wall_s`, from the first request to the end of the last answer.

    client_cpu_s: CPU time of the benchmark's own process.
    """

    wall_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    prompt_tok_s: float
    output_tok_s: float
    total_tok_s: float
    client_cpu_s: float


class RowFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One row: rates are medians over rounds; spreads are over the requests (or gaps) of all rounds together.

    ttft_ms, itl_ms, decode_tok_s: None where answers are not streamed (or have no second token).
    decode_tok_s: of a closed loop, the clients' tokens a second while all of them decode; see `_decode_rate`.
    tokens_per_event: of streams after their first event; more than 1 where the server or the network has joined some.
    """

    kind: Literal["closed", "poisson", "prefill"]
    label: str
    clients: int
    rate: float
    requests: int
    output_tokens_each: int
    prompt_tok_s: float
    output_tok_s: float
    total_tok_s: float
    ttft_ms: Spread | None
    itl_ms: Spread | None
    latency_ms: Spread
    decode_tok_s: float | None
    tokens_per_event: float | None
    rounds: list[RoundFigures]


def percentile(values: Sequence[float], percent: float) -> float:
    """With straight lines between the values, as numpy and spreadsheets do it."""
    return float(np.percentile(np.asarray(values), percent))


def spread(seconds: Sequence[float]) -> Spread | None:
    """None: there are no values."""
    if not len(seconds):
        return None
    return Spread(
        mean=1000 * statistics.fmean(seconds),
        p50=1000 * percentile(seconds, 50),
        p99=1000 * percentile(seconds, 99),
    )


def round_figures(measured: Round) -> RoundFigures:
    prompt = sum(one.prompt_tokens for one in measured.generations)
    output = sum(one.output_tokens for one in measured.generations)
    return RoundFigures(
        wall_s=measured.wall,
        prompt_tokens=prompt,
        cached_tokens=sum(one.cached_tokens for one in measured.generations),
        output_tokens=output,
        prompt_tok_s=prompt / measured.wall,
        output_tok_s=output / measured.wall,
        total_tok_s=(prompt + output) / measured.wall,
        client_cpu_s=measured.client_cpu,
    )


def row_figures(work: Work, measured: Sequence[Round]) -> RowFigures:
    rounds = [round_figures(one) for one in measured]
    generations = [one for each in measured for one in each.generations]
    gaps = [gap for one in generations for gap in _gaps(one)]
    later_tokens = sum(one.output_tokens - 1 for one in generations if one.events)
    per_event = later_tokens / len(gaps) if gaps else None
    latency = spread([one.finished - one.sent for one in generations])
    assert latency is not None, "a round without requests"
    itl = spread(gaps)
    return RowFigures(
        kind=work.kind,
        label=work.label,
        clients=work.clients,
        rate=work.rate,
        requests=work.requests,
        output_tokens_each=work.output_tokens,
        prompt_tok_s=statistics.median(one.prompt_tok_s for one in rounds),
        output_tok_s=statistics.median(one.output_tok_s for one in rounds),
        total_tok_s=statistics.median(one.total_tok_s for one in rounds),
        ttft_ms=spread([one.events[0] - one.sent for one in generations if one.events]),
        itl_ms=itl,
        latency_ms=latency,
        decode_tok_s=_decode_rate(work, itl, per_event),
        tokens_per_event=per_event,
        rounds=rounds,
    )


def _gaps(generation: Generation) -> Iterator[float]:
    events = generation.events
    return (after - before for before, after in itertools.pairwise(events))


def _decode_rate(work: Work, itl: Spread | None, per_event: float | None) -> float | None:
    """What the clients of a closed loop get together at the median gap, which is a step without prefills."""
    if work.kind != "closed" or itl is None or per_event is None or itl.p50 <= 0:
        return None
    return work.clients * per_event * 1000 / itl.p50
