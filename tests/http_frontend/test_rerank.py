"""/v1/rerank: models that judge pairs, and models that say yes or no."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fake_messages import fake_logprob, fake_vector
from fake_ring import Live, live_frontend
from hypothesis import given
from hypothesis import strategies as st

from engine.config.run import PooledFacts
from engine.wire.to_tokenizer import Judge
from http_frontend.vectors import sigmoid, softmax


@pytest.fixture(scope="module")
def pairs() -> Iterator[Live]:
    with live_frontend(pooled=PooledFacts(kind="classifier", width=1, cross_encoder=True)) as one:
        yield one


@pytest.fixture(scope="module")
def judge() -> Iterator[Live]:
    with live_frontend(judges=True) as one:
        yield one


def ids(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_documents_in_descending_order(pairs: Live) -> None:
    documents = ["hi", "panda", "b", "hi", "z" * 9]
    body = {"query": "what?", "documents": documents, "model": "any"}
    ranked = pairs.client.post("/v1/rerank", json=body).json()
    scores = [fake_vector(ids("what?" + document), 1)[0] for document in documents]
    order = sorted(range(5), key=lambda i: -scores[i])
    assert [result["index"] for result in ranked] == order, "equal scores keep the request's order"
    assert [result["score"] for result in ranked] == [scores[i] for i in order]
    assert min(scores) < 0, "without an activation scores are raw"
    assert [result["document"] for result in ranked] == [documents[i] for i in order]
    assert [result["meta_info"]["prompt_tokens"] for result in ranked] == [5 + len(documents[i]) for i in order]
    assert len({result["meta_info"]["id"] for result in ranked}) == 5
    best = pairs.client.put("/v1/rerank", json={**body, "top_n": "2", "return_documents": False}).json()
    assert [set(result) for result in best] == [{"score", "index", "meta_info"}] * 2
    assert [result["index"] for result in best] == order[:2]


def test_a_plain_embedding_model_and_its_activation() -> None:
    facts = PooledFacts(kind="embedding", width=3, score_activation="sigmoid")
    with live_frontend(pooled=facts, judges=True) as one:
        refused = one.client.post("/v1/rerank", json={"query": "q", "documents": ["d"]})
        assert (refused.status_code, refused.json()["message"]) == (
            400,
            "Detected Qwen3 reranker chat template, but the server is not in generation mode. Please relaunch without "
            "--is-embedding for Qwen3-Reranker models.",
        )
    with live_frontend(pooled=facts) as one:
        (result,) = one.client.post("/v1/rerank", json={"query": "q", "documents": ["d"]}).json()
        assert result["score"] == pytest.approx(1 / (1 + math.exp(-fake_vector(ids("qd"), 3)[0])), rel=1e-15)


def test_a_model_that_says_yes_or_no(judge: Live) -> None:
    body = {"query": "q", "documents": ["one", "three", "two"], "instruct": "be strict"}
    ranked = judge.client.post("/v1/rerank", json=body).json()
    sent = {message.document: message for message in judge.ring.kinds(Judge)}
    assert {(message.query, message.instruct) for message in sent.values()} == {("q", "be strict")}
    for result in ranked:
        prompt = ids("be strict" + "q" + result["document"])
        yes, no = math.exp(fake_logprob(prompt, 11)), math.exp(fake_logprob(prompt, 12))
        assert result["score"] == pytest.approx(yes / (yes + no), rel=1e-12)
    assert [result["score"] for result in ranked] == sorted((result["score"] for result in ranked), reverse=True)


def test_an_abort_fails_the_call(pairs: Live, judge: Live) -> None:
    for one in (pairs, judge):
        one.ring.hold.set()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(one.client.post, "/v1/rerank", json={"query": "q", "documents": ["a", "b"]})
            one.ring.wait_for(lambda ring=one.ring: len(ring.running) == 2)  # type: ignore[misc]
            assert one.client.post("/abort_request", json={"abort_all": True}).status_code == 200
            failed = waiting.result()
        one.ring.hold.clear()
        message = "The request was aborted: Abort in waiting queue"
        assert (failed.status_code, failed.json()["message"], failed.headers["retry-after"]) == (503, message, "1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": ""}, "Query cannot be empty"),
        ({"query": " \n"}, "Query cannot be empty or whitespace only"),
        ({"documents": []}, "Documents cannot be empty"),
        ({"documents": ["a", ""]}, "Each document must be a non-empty string"),
        ({"documents": ["a", "\t"]}, "Each document cannot be empty or whitespace only"),
        ({"documents": ["a", "REFUSE too long"]}, "too long"),
        ({"documents": ["a"] * 65537}, "documents may have at most 65536 entries, got 65537."),
        (
            {"query": "q" * 5000, "documents": ["a"] * 50000},
            "query of length 5000, once for each of 50000 items, exceeds 67108864 in all.",
        ),
    ],
)
def test_refusals(pairs: Live, judge: Live, change: dict[str, Any], message: str) -> None:
    expected = {"object": "error", "message": message, "type": "BadRequestError", "param": None, "code": 400}
    for one in (pairs, judge):
        refused = one.client.post("/v1/rerank", json={"query": "q", "documents": ["d"], **change})
        assert (refused.status_code, refused.json()) == (400, expected)


def test_unreadable_bodies_load_and_other_models(pairs: Live, live: Live) -> None:
    client = pairs.client
    good: dict[str, Any] = {"query": "q", "documents": ["d"]}
    refused = client.post("/v1/rerank", json={**good, "top_n": 0})
    assert (refused.status_code, refused.json()["type"]) == (400, "Bad Request")
    assert "parameter top_n should be larger than 0." in refused.json()["message"]
    for headers in ({"content-type": "text/plain"}, {}):
        refused = client.post("/v1/rerank", content=b"{}", headers=headers)
        assert refused.json()["type"] == "Bad Request"
        assert "Unsupported Media Type: Only 'application/json' is allowed" in refused.json()["message"]
    assert "Field required" in client.post("/v1/rerank", json={"query": "q"}).json()["message"]
    for wrong in ({"documents": "d"}, {"documents": [1]}, {"query": ["q"]}, {"return_documents": None}):
        assert client.post("/v1/rerank", json={**good, **wrong}).json()["type"] == "Bad Request"
    full = client.post("/v1/rerank", json={"query": "q", "documents": ["QUEUE "]})
    assert (full.status_code, full.json()["code"], full.json()["object"]) == (503, 503, "error")
    other = live.client.post("/v1/rerank", json=good).json()
    assert (other["type"], other["message"][:64]) == (
        "BadRequestError",
        "This model does not appear to be an embedding model by default. ",
    )


@given(st.floats(-3.5e38, 3.5e38))
def test_the_sigmoid_of_any_difference(x: float) -> None:
    assert 0 <= sigmoid(x) <= 1 and sigmoid(x) + sigmoid(-x) == pytest.approx(1)
    assert abs(x) > 700 or sigmoid(x) == pytest.approx(1 / (1 + math.exp(-x)), rel=1e-12)


@given(st.lists(st.floats(-3.5e38, 0), min_size=1, max_size=9), st.floats(1e-300, 1e300))
def test_a_softmax_sums_to_one(row: list[float], temperature: float) -> None:
    scores = softmax(row, temperature)
    assert math.fsum(scores) == pytest.approx(1) and all(0 <= score <= 1 for score in scores)
    best = max(range(len(row)), key=row.__getitem__)
    assert scores[best] == max(scores)
