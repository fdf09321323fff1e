"""From times to figures: percentiles, medians over rounds, gaps between events."""

from __future__ import annotations

import dataclasses
from array import array

import pytest

from engine.bench.figures import percentile, row_figures, spread
from engine.bench.http_client import Generation
from engine.bench.load import Round
from engine.bench.workload import Work

WORK = Work(kind="closed", label="2 clients", clients=2, rate=0.0, requests=2, prompt_tokens=10, output_tokens=3)


def generation(sent: float, *events: float, cached: int = 0, finished: float | None = None) -> Generation:
    end = events[-1] if finished is None else finished
    return Generation(sent, end, array("d", events), prompt_tokens=10, cached_tokens=cached, output_tokens=3)


def test_percentiles_run_straight_between_the_values() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([1.0, 2.0], 50) == 1.5
    assert percentile([0.0, 10.0], 99) == pytest.approx(9.9)
    assert percentile([7.0], 99) == 7.0


def test_a_spread_is_in_milliseconds_and_nothing_has_none() -> None:
    found = spread([0.001, 0.003])
    assert found is not None
    assert (found.mean, found.p50) == (pytest.approx(2.0), pytest.approx(2.0))
    assert spread([]) is None


def test_a_row_has_rates_of_the_median_round_and_times_of_all_requests() -> None:
    quick = [generation(0.0, 0.1, 0.2, 0.3), generation(0.0, 0.1, 0.2, 0.3, cached=4)]
    slow = [generation(5.0, 5.5, 6.0, 6.5), generation(5.0, 5.5, 6.0, 7.0)]
    middle = [generation(9.0, 9.2, 9.4, 9.6), generation(9.0, 9.2, 9.4, 9.6)]
    row = row_figures(WORK, [Round(quick, 0.3, 0.01), Round(slow, 2.0, 0.01), Round(middle, 0.6, 0.01)])
    assert row.output_tok_s == pytest.approx(6 / 0.6)
    assert row.prompt_tok_s == pytest.approx(20 / 0.6)
    assert row.total_tok_s == pytest.approx(26 / 0.6)
    assert row.ttft_ms is not None and row.ttft_ms.p50 == pytest.approx(200)
    assert row.itl_ms is not None and row.itl_ms.p50 == pytest.approx(200)
    assert row.itl_ms.p99 > 900
    assert row.latency_ms.p50 == pytest.approx(600)
    assert row.tokens_per_event == 1.0
    assert row.decode_tok_s == pytest.approx(2 / 0.2)
    assert [one.cached_tokens for one in row.rounds] == [4, 0, 0]


def test_events_of_several_tokens_count_as_such() -> None:
    joined = [generation(0.0, 0.1, 0.5), generation(0.0, 0.1, 0.5)]
    row = row_figures(WORK, [Round(joined, 0.5, 0.0)])
    assert row.tokens_per_event == 2.0
    assert row.decode_tok_s == pytest.approx(2 * 2 / 0.4)


def test_plain_answers_have_a_latency_and_nothing_finer() -> None:
    row = row_figures(WORK, [Round([generation(0.0, finished=0.5), generation(0.0, finished=0.7)], 0.7, 0.0)])
    assert (row.ttft_ms, row.itl_ms, row.decode_tok_s, row.tokens_per_event) == (None, None, None, None)
    assert row.latency_ms.p50 == pytest.approx(600)


def test_only_a_closed_loop_has_a_decode_rate() -> None:
    poisson = dataclasses.replace(WORK, kind="poisson", clients=0, rate=1.0)
    row = row_figures(poisson, [Round([generation(0.0, 0.1, 0.2, 0.3)], 0.3, 0.0)])
    assert row.itl_ms is not None and row.decode_tok_s is None
