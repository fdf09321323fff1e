"""The default model over HTTP against `transformers` in float32: cold, warm, chunked, batched, preempted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from oracle import check_greedy, reference_logprobs

from engine.bench.live_server import LiveServer, running_server

NEW_TOKENS = 48

PROMPTS = [
    "What is the capital of France?",
    "The quick brown fox",
    "def fibonacci(n):\n    ",
    "1, 1, 2, 3, 5, 8, 13,",
    "Once upon a time, in a village by the sea, there lived",
    "The chemical symbol of gold is",
    "Translate to French: Good morning!\n",
    "import numpy as np\n\nx = np.",
    "Q: How many legs has a spider?\nA:",
    "In 1969, Neil Armstrong",
    "Die Hauptstadt von Deutschland ist",
    "日本の首都は",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "SELECT name, COUNT(*) FROM users",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three laws of thermodynamics are",
    "🙂🙃🙂",
    "a",
    "    \n\n   ",
    "The following text is repeated. " * 12,
]


JUDGED: set[str] = set()
"""Answers that are right."""


def generate(server: LiveServer, texts: list[str], at_once: int) -> list[dict[str, Any]]:
    """Each text as a request of its own, `at_once` of them in flight."""

    def one(text: str) -> dict[str, Any]:
        body = {
            "text": text,
            "return_logprob": True,
            "return_prompt_token_ids": True,
            "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        }
        answer = httpx.post(f"{server.url}/generate", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        return answer.json()

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, texts))


def check(oracle: Any, answers: list[dict[str, Any]]) -> None:
    """Judge the answers; those that are equal to the last bit of their logprobs only once."""
    for answer in answers:
        prompt, output = answer["prompt_token_ids"], answer["output_ids"]
        logprobs = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
        content = json.dumps([prompt, output, logprobs])
        if content not in JUDGED:
            assert len(output) == NEW_TOKENS
            check_greedy(oracle, prompt, output, logprobs)
            JUDGED.add(content)


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with running_server("--dtype", "float32", "--log-level", "warning") as server:
        yield server


def test_cold_one_by_one_and_warm(server: LiveServer, oracle: Any) -> None:
    cold = generate(server, PROMPTS, at_once=1)
    warm = generate(server, PROMPTS, at_once=7)
    check(oracle, cold + warm)
    for answer in warm:
        assert answer["meta_info"]["cached_tokens"] == answer["meta_info"]["prompt_tokens"] - 1


@pytest.mark.parametrize("at_once", [pytest.param(7, marks=pytest.mark.slow), 32])
def test_in_batches(server: LiveServer, oracle: Any, at_once: int) -> None:
    httpx.post(f"{server.url}/flush_cache").raise_for_status()
    check(oracle, generate(server, (PROMPTS * 2)[: max(at_once, 20)], at_once))


def test_in_small_chunks(oracle: Any) -> None:
    with running_server("--dtype", "float32", "--chunked-prefill-size", "32", "--log-level", "warning") as server:
        check(oracle, generate(server, PROMPTS, at_once=7))


def test_preempted(oracle: Any) -> None:
    with running_server("--dtype", "float32", "--max-total-tokens", "400", "--log-level", "warning") as server:
        answers = generate(server, PROMPTS, at_once=20)
    assert sum(answer["meta_info"]["num_retractions"] for answer in answers) > 0
    check(oracle, answers)


def test_prompt_logprobs_with_a_warm_cache(server: LiveServer, oracle: Any) -> None:
    text = PROMPTS[-1]
    for start in (0, 5, 60, 0):
        body = {
            "text": text,
            "return_logprob": True,
            "logprob_start_len": start,
            "top_logprobs_num": 3,
            "return_prompt_token_ids": True,
            "sampling_params": {"temperature": 0, "max_new_tokens": 1},
        }
        answer = httpx.post(f"{server.url}/generate", json=body, timeout=60).json()
        prompt, meta = answer["prompt_token_ids"], answer["meta_info"]
        expected = reference_logprobs(oracle, prompt)
        assert [entry[1] for entry in meta["input_token_logprobs"]] == prompt[start:]
        assert meta["input_token_logprobs"][0][0] is None and meta["input_top_logprobs"][0] is None
        for offset in range(1, len(prompt) - start):
            row = expected[start + offset - 1]
            assert abs(meta["input_token_logprobs"][offset][0] - float(row[prompt[start + offset]])) < 1e-3
            top = [entry[0] for entry in meta["input_top_logprobs"][offset]]
            assert top == pytest.approx(torch.topk(row, 3).values.tolist(), abs=1e-3)
