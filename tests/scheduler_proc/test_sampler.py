"""Sampling against a plain restatement of contract §6.2 in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from backends import ISAS, backend
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import admit

from engine.kernels.reference_sampling import best_ids
from engine.kernels.table import Backend
from engine.wire.results import FLOAT32_MIN, TokenLogprobs
from engine.wire.sampling import LogprobOptions, Sampling
from scheduler_proc.prompt_logprobs import record
from scheduler_proc.request import Request, new_request
from scheduler_proc.sampler import adjust, output_logprobs, sample

LOGITS = st.lists(st.integers(-20, 20).map(lambda n: n / 2), min_size=1, max_size=40)
BACKENDS = [backend("reference"), *(backend(isa) for isa in ISAS[:1])]
EACH_BACKEND = pytest.mark.parametrize("ops", BACKENDS, ids=lambda ops: ops.name)
PARAMETERS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([-1, 1, 2, 5, 1000]),
        "top_p": st.sampled_from([1.0, 0.9, 0.5, 0.01]),
        "min_p": st.sampled_from([0.0, 0.2, 1.0]),
    }
)


def draw(ops: Backend, row: torch.Tensor, sampling: Sampling, draws: list[float]) -> list[int]:
    """The ids that `ops` draws from one row of logits [V], for each of `draws` in [0, 1)."""
    count = len(draws)
    return ops.draw(
        row[None],
        np.zeros(count, np.int64),
        np.full(count, sampling.temperature),
        np.full(count, sampling.top_k),
        np.full(count, sampling.top_p),
        np.full(count, sampling.min_p),
        np.array(draws),
    ).tolist()


def naive_distribution(logits: list[float], parameters: Sampling) -> dict[int, float]:
    """Token → probability after temperature, top_k, top_p and min_p, as the contract words them."""
    peak = max(logits)
    weights = [math.exp((z - peak) / parameters.temperature) for z in logits]
    probabilities = [w / sum(weights) for w in weights]
    order = sorted(range(len(logits)), key=lambda t: (-logits[t], t))
    if parameters.top_k != -1:
        order = order[: parameters.top_k]
    kept, before = [], 0.0
    for token in order:
        if before > parameters.top_p + 1e-6:
            break
        kept.append(token)
        before += probabilities[token]
    kept = [t for t in kept if probabilities[t] >= parameters.min_p * max(probabilities) * (1 - 1e-6)]
    total = sum(probabilities[t] for t in kept)
    return {t: probabilities[t] / total for t in kept}


@EACH_BACKEND
@settings(max_examples=80, deadline=None)
@given(LOGITS, PARAMETERS)
def test_draws_follow_the_filtered_distribution(
    ops: Backend, logits: list[float], parameters: dict[str, float]
) -> None:
    sampling = Sampling(**parameters)  # type: ignore[arg-type]
    expected = naive_distribution(logits, sampling)
    row = torch.tensor(logits, dtype=torch.float32)
    steps = 200
    drawn = draw(ops, row, sampling, [(i + 0.5) / steps for i in range(steps)])
    for token in set(drawn) | set(expected):
        assert drawn.count(token) / steps == pytest.approx(expected.get(token, 0.0), abs=2.5 / steps)


@EACH_BACKEND
def test_the_whole_unit_interval_is_safe(ops: Backend) -> None:
    row = torch.full((100,), -torch.inf)
    row[3] = row[50] = 0.0
    draws = [0.0, 0.49999, 0.5, float(np.nextafter(1.0, 0.0))]
    assert draw(ops, row, Sampling(), draws) == [3, 3, 50, 50]
    assert draw(ops, row, Sampling(top_p=0.99), draws) == [3, 3, 50, 50]


@EACH_BACKEND
def test_a_nucleus_wider_than_the_first_guess(ops: Backend) -> None:
    row = torch.zeros(1024)
    drawn = set(draw(ops, row, Sampling(top_p=0.5), [(i + 0.5) / 1024 for i in range(1024)]))
    assert drawn == set(range(513))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=50), st.integers(0, 60))
def test_best_ids_breaks_ties_by_the_lower_id(scores: list[int], count: int) -> None:
    expected = sorted(range(len(scores)), key=lambda t: (-scores[t], t))[:count]
    assert best_ids(np.array(scores, np.float32), count).tolist() == expected


def _request(output: list[int], **sampling: object) -> Request:
    request = new_request(admit(1, [9], new=100, **sampling), 1, 1000)  # type: ignore[arg-type]
    for token in output:
        request.append(token)
    return request


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-8, 8), min_size=10, max_size=10),
    st.lists(st.integers(0, 9), max_size=12),
    st.sampled_from([0.0, 1.5, -2.0]),
    st.sampled_from([0.0, 0.7]),
    st.sampled_from([1.0, 1.3, 0.5]),
    st.dictionaries(st.integers(0, 9), st.sampled_from([-100.0, 2.0]), max_size=3),
    st.integers(0, 6),
)
def test_penalties_bias_and_minimum_length(
    logits: list[int],
    output: list[int],
    frequency: float,
    presence: float,
    repetition: float,
    bias: dict[int, float],
    minimum: int,
) -> None:
    request = _request(
        output,
        frequency_penalty=frequency,
        presence_penalty=presence,
        repetition_penalty=repetition,
        logit_bias={str(k): v for k, v in bias.items()},
        min_new_tokens=minimum,
        stop_token_ids=[4],
    )
    expected = [float(z) for z in logits]
    for token in range(10):
        if len(output) < minimum and token in (0, 4):
            expected[token] = -math.inf
        expected[token] -= frequency * output.count(token) + (presence if token in output else 0.0)
        if token in output:
            z = expected[token]
            expected[token] = z * repetition if z < 0 else z / repetition
        expected[token] += bias.get(token, 0.0)
    row = torch.tensor(logits, dtype=torch.float32)
    adjust(row, request, [0])
    assert row.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_resumed_output_counts_for_the_penalties() -> None:
    request = new_request(admit(1, [9], earlier=[2, 2, 3], frequency_penalty=1.0), 1, 100)
    row = torch.zeros(5)
    adjust(row, request, [0])
    assert row.tolist() == [0.0, 0.0, -2.0, -1.0, 0.0]


@EACH_BACKEND
@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 2**63 - 1))
def test_a_row_is_sampled_alike_in_any_company(ops: Backend, noise: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(noise)
    logits = torch.randn(7, 100, generator=generator) * 3
    requests = [
        _request(
            [5] * i,
            temperature=1.3 if i != 4 else 0.0,
            seed=seed - i,
            top_p=0.9 if i % 2 else 1.0,
            frequency_penalty=0.5,
            logprobs=LogprobOptions(top=i, ids=[7, 0][:i]) if i % 3 else None,
        )
        for i in range(7)
    ]
    together = sample(ops, logits.clone(), requests, [0], original_logprobs=False)
    for i, request in enumerate(requests):
        (alone,) = sample(ops, logits[i : i + 1].clone(), [request], [0], original_logprobs=False)
        assert alone == together[i]


@EACH_BACKEND
def test_negative_seeds_and_positions_change_the_draw(ops: Backend) -> None:
    logits = torch.zeros(1, 1000)
    tokens = set()
    for seed in (-(2**63), -1, 0, 1, 2**63 - 1):
        for output in ([], [1]):
            request = _request(output, seed=seed, temperature=1.0)
            tokens.add(sample(ops, logits.clone(), [request], [], original_logprobs=False)[0].token)
    assert len(tokens) > 8


@EACH_BACKEND
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_finite_have_no_token(ops: Backend, temperature: float) -> None:
    logits = torch.zeros(4, 4)
    logits[0, 2] = torch.nan
    logits[1] = -torch.inf
    logits[2, 3] = torch.inf
    logits[3, 1:] = -torch.inf
    requests = [_request([], temperature=temperature, logprobs=LogprobOptions(top=1)) for _ in range(4)]
    rows = sample(ops, logits, requests, [], original_logprobs=False)
    assert [row.token for row in rows] == [None, None, None, 0]
    assert [row.logprobs is None for row in rows] == [True, True, True, False]


@pytest.mark.parametrize(("temperature", "original", "scale"), [(0.0, False, 1.0), (0.5, False, 0.5), (0.5, True, 1.0)])
@EACH_BACKEND
def test_logprobs_before_or_after_temperature(ops: Backend, temperature: float, original: bool, scale: float) -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0]])
    request = _request([], temperature=temperature, logprobs=LogprobOptions(top=5, ids=[2, 2]))
    (row,) = sample(ops, logits.clone(), [request], [], original_logprobs=original)
    expected = torch.log_softmax(logits[0] / scale, dim=-1).tolist()
    assert row.token is not None and row.logprobs is not None and row.logprobs.top is not None
    assert row.logprobs.logprob == pytest.approx(expected[row.token])
    assert row.logprobs.top == [(pytest.approx(expected[token]), token) for token in (1, 0, 2)]
    assert row.logprobs.ids == [(pytest.approx(expected[2]), 2)] * 2


@EACH_BACKEND
def test_prompt_logprobs_come_from_raw_logits(ops: Backend) -> None:
    request = new_request(
        admit(1, [3, 1, 2, 0], new=4, temperature=0.3, logprobs=LogprobOptions(start=0, top=2, ids=[2])), 1, 99
    )
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0], [1.0, 1.0, -torch.inf, 0.0], [4.0, 0.0, 0.0, 0.0]])
    record(ops, request, 0, logits[:2])
    record(ops, request, 2, logits[2:])
    expected = torch.log_softmax(logits.double(), dim=-1)
    entries = request.prompt_logprobs
    assert entries is not None and entries.top is not None and entries.ids is not None
    assert entries.tokens == [
        (None, 3),
        (pytest.approx(expected[0, 1].item()), 1),
        (FLOAT32_MIN, 2),
        (pytest.approx(expected[2, 0].item()), 0),
    ]
    assert [top and [token for _, token in top] for top in entries.top] == [None, [3, 2], [0, 1], [0, 1]]
    assert entries.ids[1:] == [
        [(pytest.approx(value) if value > -torch.inf else FLOAT32_MIN, 2)] for value in expected[:, 2].tolist()
    ]


@EACH_BACKEND
def test_logprobs_of_an_output_position(ops: Backend) -> None:
    def of_row(token: int, temperature: float, wanted: LogprobOptions) -> TokenLogprobs:
        return output_logprobs(ops, row[None], [0], [token], [temperature], [wanted])[0]

    row = torch.tensor([0.0, 2.0, 2.0, -torch.inf])
    expected = torch.log_softmax(row / 0.5, dim=-1).tolist()
    found = of_row(2, 0.5, LogprobOptions(top=3, ids=[3, 0]))
    assert found.logprob == pytest.approx(expected[2])
    assert found.top is not None and [token for _, token in found.top] == [1, 2, 0]
    assert found.ids == [(FLOAT32_MIN, 3), (pytest.approx(expected[0]), 0)]
    greedy = of_row(1, 1.0, LogprobOptions(top=1))
    assert greedy.top == [(greedy.logprob, 1)]
    assert greedy.logprob == pytest.approx(torch.log_softmax(row, dim=-1)[1].item())


@EACH_BACKEND
@pytest.mark.parametrize("temperature", [0.0, 2e-6, 0.5, 1.0, 1e308])
@pytest.mark.parametrize(
    "parameters",
    [
        {"logit_bias": {"2": 1e308}},
        {"logit_bias": {"2": 1e308}, "frequency_penalty": -2.0, "repetition_penalty": 1e-300},
        {"logit_bias": {"0": -1e308, "2": 100.0}, "min_new_tokens": 4, "stop_token_ids": [1, 5, -1, 2**64 - 1]},
        {"logit_bias": {"0": -1e308, "1": -1e308}, "min_new_tokens": 4, "stop_token_ids": [7]},
    ],
)
def test_extremes_neither_overflow_nor_fail(ops: Backend, temperature: float, parameters: dict[str, Any]) -> None:
    wanted = LogprobOptions(top=3)
    request = new_request(
        admit(1, [1, 3], earlier=[2], logprobs=wanted, **{"temperature": temperature, **parameters}), 1, 9
    )
    (row,) = sample(ops, torch.tensor([[0.5, 1.0, 0.0]]), [request], [9, -4], original_logprobs=False)
    assert row.token == 2 or (temperature == 1e308 and row.token is not None)
    assert row.logprobs is not None and row.logprobs.top is not None
    assert all(FLOAT32_MIN <= logprob <= 0 for logprob, _ in row.logprobs.top)
