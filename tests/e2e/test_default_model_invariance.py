"""Promise 2 over HTTP with the default model in bfloat16: every answer, its logprobs by their bits, is the same alone
and among 15 others, cold and on a cache hit, in small chunks on one thread, and with so small a pool that requests are
preempted."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from test_default_model_parity import PROMPTS

from engine.bench.live_server import LiveServer, running_server

FLAGS = ("--dtype", "bfloat16", "--log-level", "warning")
NEW_TOKENS = 40
LONG = "The quick brown fox jumps over the lazy dog. " * 30
TEXTS = [*PROMPTS[:13], LONG, LONG + "Once", "One day, " + LONG]
"""Sixteen; three of them are longer than two blocks of keys, and two of these share a prefix."""


def ask(server: LiveServer, number: int) -> dict[str, Any]:
    """Question `number`: the even ones greedy, the others sampled."""
    text = TEXTS[number]
    sampling: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, "temperature": 0}
    if number % 2:
        sampling |= {"temperature": 0.8, "top_p": 0.9, "sampling_seed": number}
    body: dict[str, Any] = {
        "text": text, "sampling_params": sampling, "return_logprob": True, "top_logprobs_num": 2,
        "logprob_start_len": 200 if len(text) > 1000 else -1,
    }  # fmt: skip
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    assert len(found["output_ids"]) == NEW_TOKENS
    return found


def content(answer: dict[str, Any]) -> list[Any]:
    """What must not change. JSON's numbers are read to the last bit."""
    meta = answer["meta_info"]
    logprobs = {name: meta[name] for name in sorted(meta) if name.endswith("_logprobs")}
    assert {"output_token_logprobs", "output_top_logprobs", "input_token_logprobs"} <= logprobs.keys()
    return [answer["output_ids"], answer["text"], logprobs]


def together(server: LiveServer) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(len(TEXTS)) as pool:
        return list(pool.map(lambda number: ask(server, number), range(len(TEXTS))))


def check_same(answers: list[dict[str, Any]], expected: list[list[Any]]) -> None:
    for number, answer in enumerate(answers):
        assert content(answer) == expected[number], f"question {number}: {TEXTS[number][:30]!r}"


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with running_server(*FLAGS, "--cpu-threads", "2") as server:
        yield server


@pytest.fixture(scope="module")
def expected(server: LiveServer) -> list[list[Any]]:
    """The answers of each question alone, nothing cached."""
    found = []
    for number in range(len(TEXTS)):
        httpx.post(f"{server.url}/flush_cache").raise_for_status()
        answer = ask(server, number)
        assert answer["meta_info"]["cached_tokens"] == 0
        found.append(content(answer))
    return found


def test_among_others_and_on_a_cache_hit(server: LiveServer, expected: list[list[Any]]) -> None:
    httpx.post(f"{server.url}/flush_cache").raise_for_status()
    check_same(together(server), expected)
    again = together(server)
    check_same(again, expected)
    assert all(answer["meta_info"]["cached_tokens"] > 0 for answer in again if answer["meta_info"]["prompt_tokens"] > 1)


def test_in_small_chunks_on_one_thread(expected: list[list[Any]]) -> None:
    with running_server(*FLAGS, "--chunked-prefill-size", "32", "--cpu-threads", "1") as server:
        check_same(together(server), expected)


def test_preempted(expected: list[list[Any]]) -> None:
    with running_server(*FLAGS, "--max-total-tokens", "800", "--cpu-threads", "3") as server:
        answers = together(server)
        check_same(answers, expected)
    assert sum(answer["meta_info"]["num_retractions"] for answer in answers) > 0
