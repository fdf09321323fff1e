"""/v1/score on a live server, against transformers in float32 (contract §3.9)."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from live_client import Api
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

QUERY = "The quick brown fox jumps over the lazy dog. "
ITEMS = ["Hello", "def add(a, b):", "", "Hello world"]
LABELS = [9, 300, 4]


def logprobs(model: Any, ids: list[int], labels: list[int]) -> list[float]:
    """The reference: of the next token, in float64 from the float32 logits."""
    with torch.inference_mode():
        row = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    return [float(row[label]) for label in labels]


def test_scores_are_the_next_token_distribution(tiny_api: Api, tiny_model: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer: Any = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))

    def score(**body: Any) -> Any:
        answer = tiny_api.post({"label_token_ids": LABELS, **body}, "/v1/score")
        assert answer.status_code == 200, answer.text
        return answer.json()

    prompts = [tokenizer.encode(QUERY + item).ids for item in ITEMS]
    wanted = [logprobs(model, ids, LABELS) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: score(query=QUERY, items=ITEMS, return_token_logprobs=True), range(8)))
    for answer in answers:
        assert (answer["scores"], answer["token_logprobs"]) == (answers[0]["scores"], answers[0]["token_logprobs"])
        assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    for row, scores, expected in zip(answers[0]["token_logprobs"], answers[0]["scores"], wanted, strict=True):
        assert row == pytest.approx(expected, abs=2e-4)
        assert scores == [math.exp(logprob) for logprob in row]

    soft = score(query=QUERY, items=ITEMS, apply_softmax=True, temperature=3, label_token_ids=[LABELS] * 4)["scores"]
    for scores, expected in zip(soft, wanted, strict=True):
        assert scores == pytest.approx(torch.tensor(expected).div(3).softmax(-1).tolist(), abs=1e-4)
    first = score(query=[5, 6, 7], items=[[8, 9]], item_first=True)["scores"]
    assert first[0] == pytest.approx([math.exp(x) for x in logprobs(model, [8, 9, 5, 6, 7], LABELS)], rel=1e-3)


def test_what_is_too_long_or_unknown_is_refused_in_shape_d(tiny_api: Api) -> None:
    for body, words in (
        ({"items": [[5] * 16384], "query": []}, "longer than the model's context length (16384 tokens)."),
        ({"items": ["x"], "label_token_ids": [10**6]}, "Token ID 1000000 is out of vocabulary (vocab size: "),
        ({"items": [[10**6]]}, "input_ids contains out-of-vocabulary token id 1000000; valid range is [0, "),
    ):
        refused = tiny_api.post({"label_token_ids": [1], **body}, "/v1/score")
        assert (refused.status_code, refused.json()["type"]) == (400, "BadRequestError")
        assert words in refused.json()["message"]
