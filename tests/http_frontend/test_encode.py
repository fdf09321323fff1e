"""/encode and /classify of a real frontend process with a fake ring behind it."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from fake_messages import fake_vector
from fake_ring import Live, live_frontend
from hypothesis import given
from hypothesis import strategies as st

from engine.config.run import PooledFacts
from engine.wire.to_tokenizer import Embed, Generate
from http_frontend.vectors import numbers

WIDTH = 4
NO_MATRYOSHKA = "does not support matryoshka representation, changing output dimensions will lead to poor results."


@pytest.fixture(scope="module")
def vectors() -> Iterator[Live]:
    with live_frontend(pooled=PooledFacts(kind="embedding", width=WIDTH, dimensions=[2, 3, 9])) as one:
        yield one


@pytest.fixture(scope="module")
def pairs() -> Iterator[Live]:
    facts = PooledFacts(kind="classifier", width=1, cross_encoder=True, score_activation="sigmoid")
    with live_frontend(pooled=facts) as one:
        yield one


def vector(text: str, width: int = WIDTH) -> list[float]:
    return fake_vector([ord(letter) for letter in text], width).tolist()


def test_one_text(vectors: Live) -> None:
    body = {"text": "hé", "rid": "mine", "model": "any", "image_data": None, "sampling_params": {"unknown": 1}}
    answer = vectors.client.post("/encode", json=body).json()
    meta = answer.pop("meta_info")
    assert answer == {"embedding": vector("hé")}
    assert meta.pop("e2e_latency") > 0
    assert meta.pop("response_sent_to_client_ts") > 1.7e9
    assert meta == {
        "id": "mine",
        "finish_reason": {"type": "length", "length": 0},
        "prompt_tokens": 2,
        "weight_version": "v7",
        "num_retractions": 1,
    }


def test_batches_ids_and_what_can_be_added(vectors: Live) -> None:
    client = vectors.client
    texts = ["a", "", "bcd", "a"]
    answers = client.put("/encode", json={"text": texts, "rid": ["w", "x", "y", "z"]}).json()
    assert [answer["embedding"] for answer in answers] == [vector(text) for text in texts]
    assert [answer["meta_info"]["id"] for answer in answers] == ["w", "x", "y", "z"]
    assert [answer["meta_info"]["prompt_tokens"] for answer in answers] == [1, 0, 3, 1]
    assert client.post("/encode", json={"text": []}).json() == []
    (listed,) = client.post("/classify", json={"text": ["a"]}).json()
    assert listed["embedding"] == vector("a")
    ids = client.post("/encode", json={"input_ids": [97, 98], "return_prompt_token_ids": True}).json()
    assert (ids["embedding"], ids["prompt_token_ids"]) == (vector("ab"), [97, 98])
    nested = {"input_ids": [["97"], [98]], "dimensions": "2", "return_pooled_hidden_states": True}
    cut = client.post("/encode", json=nested).json()
    assert [answer["embedding"] for answer in cut] == [vector("a", 2), vector("b", 2)]
    assert [answer["pooled_hidden_state"] for answer in cut] == [array("f", [0.1, 0.7]).tolist()] * 2
    assert client.post("/encode", json={"text": "a", "return_prompt_token_ids": "true"}).json()["prompt_token_ids"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "At least one of text, input_ids, image, video, or audio should be provided"),
        ({"text": "a", "input_ids": [1]}, "text and input_ids cannot be provided at the same time"),
        ({"input_ids": []}, "input_ids cannot be empty."),
        ({"input_ids": [[1], []]}, "input_ids cannot be empty."),
        ({"input_ids": [2**40]}, f"input_ids contains out-of-vocabulary token id {2**40}; valid range is [0, 1000)."),
        ({"text": ["a", "b"], "rid": "x"}, "rid must be a list of 2 strings for a batch, got a string."),
        ({"text": ["a", "b"], "rid": ["x", "x"]}, "Duplicate request IDs detected within the request: ['x']"),
        (
            {"text": ["a", "b"], "rid": ["x"]},
            "The specified rids length mismatch with the batch_size for batch processing.",
        ),
        ({"text": "a", "dimensions": 0}, "Requested dimensions must be greater than 0"),
        (
            {"text": "a", "dimensions": 4},
            "Model 'org/model-x' only supports [2, 3, 9] matryoshka dimensions, using other output dimensions will "
            "lead to poor results.",
        ),
        ({"text": "a", "dimensions": 9}, "Provided dimensions are greater than max embedding dimension: 4"),
        ({"text": [["a", "b"]]}, "text may hold pairs of texts only with is_cross_encoder_request: true"),
        ({"text": "a", "image_data": "data:"}, "image_data must be null or []: the model takes text only"),
        (
            {"text": "a", "lora_path": "x"},
            "LoRA adapter 'x' was requested, but LoRA is not enabled. Please launch the server with --enable-lora flag "
            "and preload adapters using --lora-paths or /load_lora_adapter endpoint.",
        ),
        ({"text": "REFUSE the words"}, "the words"),
        ({"text": ["a", "REFUSE the words"]}, "the words"),
    ],
)
def test_refusals(vectors: Live, body: dict[str, Any], message: str) -> None:
    refused = vectors.client.post("/encode", json=body)
    assert (refused.status_code, refused.json()) == (400, {"error": {"message": message}})


def test_unreadable_bodies_and_load(vectors: Live) -> None:
    client = vectors.client
    wrong = ({"text": 5}, {"text": ["a", 5]}, {"text": "a", "dimensions": 1.5}, {"text": "a", "rid": 1}, [1])
    for body in (*wrong, {"input_ids": "x"}, {"text": "a", "is_cross_encoder_request": None}):
        assert client.post("/encode", json=body).json()["type"] == "Bad Request"
    assert "Field required" in client.post("/encode").json()["message"]
    assert client.post("/encode", content="{}", headers={"content-type": "text/plain"}).status_code == 400
    full = client.post("/encode", json={"text": "QUEUE x"})
    assert (full.status_code, full.json()["type"], full.headers["retry-after"]) == (503, "503", "1")
    assert set(client.get("/encode").headers["allow"].split(", ")) == {"POST", "PUT"}
    generating = client.post("/generate", json={"text": "a"})
    assert generating.json()["error"]["message"].startswith("This model is an embedding model and does not support")


def test_a_model_that_generates_and_one_without_matryoshka(live: Live, pairs: Live) -> None:
    for path in ("/encode", "/classify"):
        refused = live.client.post(path, json={"text": "a"})
        assert (refused.status_code, refused.json()["error"]["message"]) == (
            400,
            "This model does not appear to be an embedding model by default. Please add `--is-embedding` when "
            "launching the server or try another model.",
        )
    refused = pairs.client.post("/encode", json={"text": "a", "dimensions": 1})
    assert refused.json()["error"]["message"] == f"Model 'org/model-x' {NO_MATRYOSHKA}"


def test_pairs(pairs: Live) -> None:
    client = pairs.client
    one = client.post("/encode", json={"text": ["q", "d"], "is_cross_encoder_request": True}).json()
    many = client.post("/encode", json={"text": [["q", "d"], ["q", "ee"]], "is_cross_encoder_request": True}).json()
    assert one["embedding"] == many[0]["embedding"] and 0 < one["embedding"] < 1
    assert [(message.text, message.pair) for message in pairs.ring.embeds()[-2:]] == [("q", "d"), ("q", "ee")]
    assert client.post("/classify", json={"text": "qd"}).json()["embedding"] == vector("qd", 1), "raw"
    assert client.post("/encode", json={"text": [], "is_cross_encoder_request": True}).json() == []
    for wrong in ("q", ["q"], ["a", "b", "c"], [["a"]], [["a", "b"], "c"]):
        refused = client.post("/encode", json={"text": wrong, "is_cross_encoder_request": True})
        assert refused.json()["error"]["message"].startswith("text must be a pair of texts, [query, document]")


def test_probes_and_warm_up_are_for_vectors(vectors: Live) -> None:
    assert vectors.client.get("/health_generate").status_code == 200
    assert vectors.client.get("/model_info").json()["is_generation"] is False
    probes = [message for message in vectors.ring.kinds(Embed) if message.rid.startswith("HEALTH_CHECK_")]
    assert probes and all(probe.input_ids == array("i", [0]).tobytes() for probe in probes)
    assert any(message.rid.startswith("WARM_UP_") and message.text for message in vectors.ring.kinds(Embed))
    assert not vectors.ring.kinds(Generate)


def test_abort_and_disconnect() -> None:
    with live_frontend(pooled=PooledFacts(kind="embedding", width=2)) as one, ThreadPoolExecutor(1) as pool:
        one.ring.hold.set()
        waiting = pool.submit(one.client.post, "/encode", json={"text": ["a", "b"], "rid": ["r-a", "r-b"]})
        one.ring.wait_for(lambda: len(one.ring.running) == 2)
        twice = one.client.post("/encode", json={"text": "c", "rid": "r-a"})
        assert twice.json()["error"]["message"] == "Duplicate request ID detected: r-a"
        assert one.client.post("/abort_request", json={"rid": "r-"}).status_code == 200
        for answer in waiting.result().json():
            assert (answer["embedding"], answer["meta_info"]["finish_reason"]["type"]) == ([], "abort")

        body = json.dumps({"text": ["x", "y"], "rid": ["gone1", "gone2"]}).encode()
        head = ["POST /encode HTTP/1.1", "Host: a", "Content-Type: application/json", f"Content-Length: {len(body)}"]
        with one.socket() as client:
            client.sendall("\r\n".join([*head, "", ""]).encode() + body)
            one.ring.wait_for(lambda: len(one.ring.running) == 2)
            keys = set(one.ring.running)
        one.ring.wait_for(lambda: keys <= one.ring.aborted())

        running = pool.submit(one.client.post, "/encode", json={"text": "late"})
        one.ring.wait_for(lambda: len(one.ring.running) == 1)
        one.drain(20)
        while one.client.get("/ready").status_code == 200:
            pass
        assert one.client.post("/encode", json={"text": "new"}).status_code == 503
        one.ring.hold.clear()
        assert running.result().json()["embedding"] == vector("late", 2)
        assert one.process.wait(20) == 0


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_numbers_come_back_as_the_same_float32(row: list[float]) -> None:
    packed = array("f", row).tobytes()
    assert array("f", json.loads(msgspec.json.encode(numbers(packed)))).tobytes() == packed
