"""/v1/score: tokens that may follow a text, and a classifier's labels."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from typing import Any

import pytest
from fake_messages import fake_logprob, fake_vector
from fake_ring import Live, live_frontend

from engine.config.run import PooledFacts
from engine.wire.to_tokenizer import Generate


@pytest.fixture(scope="module")
def labels() -> Iterator[Live]:
    with live_frontend(pooled=PooledFacts(kind="classifier", width=3)) as one:
        yield one


def ids(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def row(text: str, labels: list[int]) -> list[float]:
    return [fake_logprob(ids(text), label) for label in labels]


def softmax(values: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(value / temperature) for value in values]
    return [power / sum(powers) for power in powers]


def test_probabilities_of_labels(live: Live) -> None:
    body = {"query": "is it? ", "items": ["yes", "no", ""], "label_token_ids": [7, 5, 9], "model": "m"}
    answer = live.client.post("/v1/score", json={**body, "return_token_logprobs": True}).json()
    rows = [row("is it? " + item, [7, 5, 9]) for item in ("yes", "no", "")]
    assert answer == {
        "scores": [[pytest.approx(math.exp(logprob), rel=1e-15) for logprob in one] for one in rows],
        "pooled_hidden_states": None,
        "token_logprobs": rows,
        "model": "m",
        "usage": {
            "prompt_tokens": 26,
            "total_tokens": 26,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
            "reasoning_tokens": 0,
            "completion_tokens_details": None,
        },
        "object": "scoring",
    }
    sent = live.ring.kinds(Generate)[-3:]
    assert {message.sampling.max_new_tokens for message in sent} == {0}
    assert all(message.sampling.temperature == 1 and message.logprobs.start == -1 for message in sent)


def test_softmax_order_kinds_and_own_labels(live: Live) -> None:
    def scores(**body: Any) -> Any:
        return live.client.post("/v1/score", json=body).json()["scores"]

    soft = scores(
        query="ab", items="c", label_token_ids=["1", 2], apply_softmax="true", temperature="2", item_first=True
    )
    assert soft == [pytest.approx(softmax(row("cab", [1, 2]), 2.0))]
    assert live.ring.kinds(Generate)[-1].text == "cab"
    own = scores(query=[5, 6], items=[[7], []], label_token_ids=[[1], [2, 3]], item_first=False)
    assert [len(one) for one in own] == [1, 2]
    assert [message.input_ids for message in live.ring.kinds(Generate)[-2:]] == [
        array("i", [5, 6, 7]).tobytes(),
        array("i", [5, 6]).tobytes(),
    ]
    assert scores(items=["x"], label_token_ids=[4]) == [pytest.approx([math.exp(row("x", [4])[0])])]
    assert scores(items=[[120]], label_token_ids=[4]) == scores(items=["x"], label_token_ids=[4])
    assert scores(items=[], query="q", label_token_ids=[4]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_token_ids": None}, "label_token_ids is required for generation (CausalLM) models."),
        ({"items": None}, "items must be provided"),
        ({"label_token_ids": []}, "label_token_ids must be a nonempty list"),
        ({"label_token_ids": [[1]]}, "label_token_ids must have one list per item"),
        ({"label_token_ids": [[1], []]}, "each item must have a nonempty candidate list"),
        ({"label_token_ids": [1, -1]}, "label_token_ids must contain nonnegative integers"),
        ({"label_token_ids": [[1], [2, 2]]}, "label_token_ids must not contain duplicate tokens"),
        ({"label_token_ids": [1, 1000]}, "Token ID 1000 is out of vocabulary (vocab size: 1000)"),
        ({"temperature": 2}, "temperature requires apply_softmax=True"),
        ({"query": [1]}, "Invalid combination of query/items types for score_request."),
        ({"items": [[1], [2]]}, "Invalid combination of query/items types for score_request."),
        ({"items": [[1], "a"]}, "Invalid combination of query/items types for score_request."),
        (
            {"query": [1], "items": [[2**40], [1]]},
            f"input_ids contains out-of-vocabulary token id {2**40}; valid range is [0, 1000).",
        ),
        ({"query": [], "items": [[], [1]]}, "input_ids cannot be empty."),
        (
            {"return_pooled_hidden_states": True},
            "return_pooled_hidden_states is not supported for CausalLM models. It requires a model with a "
            "task-specific head (e.g. SequenceClassification or RewardModel).",
        ),
        ({"query": "REFUSE this"}, "thisa"),
        (
            {"items": ["a"] * 65536, "query": "q" * 1025},
            "query of length 1025, once for each of 65536 items, exceeds 67108864 in all.",
        ),
    ],
)  # fmt: skip
def test_refusals(live: Live, change: dict[str, Any], message: str) -> None:
    body = {"query": "q", "items": ["a", "b"], "label_token_ids": [1], **change}
    refused = live.client.post("/v1/score", json=body)
    expected = {"object": "error", "message": message, "type": "BadRequestError", "param": None, "code": 400}
    assert (refused.status_code, refused.json()) == (400, expected)


def test_unreadable_bodies(live: Live) -> None:
    good: dict[str, Any] = {"query": "q", "items": ["a"], "label_token_ids": [1], "apply_softmax": True}
    wrong = ({"temperature": 0}, {"temperature": -1}, {"items": [1]}, {"query": 5}, {"label_token_ids": "x"})
    for change in (*wrong, {"label_token_ids": [1, [2]]}, {"apply_softmax": None}):
        refused = live.client.post("/v1/score", json={**good, **change})
        assert (refused.status_code, refused.json()["type"]) == (400, "Bad Request")
    refused = live.client.post("/v1/score", content=b"{}", headers={"content-type": "text/json"})
    assert "Unsupported Media Type" in refused.json()["message"]
    assert live.client.put("/v1/score", json=good).status_code == 405
    full = live.client.post("/v1/score", json={**good, "query": "QUEUE "})
    assert (full.status_code, full.json()["code"]) == (503, 503)


def test_a_classifier(labels: Live) -> None:
    body = {"query": "q", "items": ["a", "bb"], "label_token_ids": [-5], "return_pooled_hidden_states": True}
    answer = labels.client.post("/v1/score", json=body).json()
    logits = [fake_vector(ids("q" + item), 3).tolist() for item in ("a", "bb")]
    assert (answer["scores"], answer["token_logprobs"]) == (logits, None)
    assert answer["pooled_hidden_states"] == [array("f", [0.1, 0.7]).tolist()] * 2
    assert (answer["model"], answer["usage"]["prompt_tokens"]) == ("default", 5)
    body = {"items": "x", "apply_softmax": True, "temperature": 0.5}
    soft = labels.client.post("/v1/score", json=body).json()["scores"]
    assert soft == [pytest.approx(softmax(fake_vector(ids("x"), 3).tolist(), 0.5))]
    refused = labels.client.post("/v1/score", json={"items": "x", "return_token_logprobs": True}).json()
    assert refused["message"] == "return_token_logprobs is only supported for CausalLM models"
