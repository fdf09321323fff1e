"""/v1/embeddings: vectors in OpenAI's shape."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest
from fake_messages import fake_vector
from fake_ring import Live, live_frontend

from engine.config.run import PooledFacts


@pytest.fixture(scope="module")
def vectors() -> Iterator[Live]:
    with live_frontend(pooled=PooledFacts(kind="embedding", width=4, dimensions=[])) as one:
        yield one


def vector(text: str, width: int = 4) -> list[float]:
    return fake_vector([ord(letter) for letter in text], width).tolist()


def test_texts_and_ids(vectors: Live) -> None:
    answer = vectors.client.post("/v1/embeddings", json={"input": "ab", "model": "m", "user": "u"}).json()
    assert answer == {
        "object": "list",
        "data": [{"object": "embedding", "embedding": vector("ab"), "index": 0}],
        "model": "m",
        "usage": {"prompt_tokens": 2, "total_tokens": 2},
    }
    for given in (["ab", "3"], [[97, 98], [51]]):
        answer = vectors.client.post("/v1/embeddings", json={"input": given, "dimensions": 3}).json()
        assert [one["embedding"] for one in answer["data"]] == [vector("ab", 3), vector("3", 3)]
        assert [one["index"] for one in answer["data"]] == [0, 1]
        assert (answer["model"], answer["usage"]["total_tokens"]) == ("default", 3)
    packed = vectors.client.post("/v1/embeddings", json={"input": [97, 98], "encoding_format": "base64"}).json()
    assert base64.b64decode(packed["data"][0]["embedding"]) == fake_vector([97, 98], 4).tobytes()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": ""}, "Input cannot be empty"),
        ({"input": []}, "Input cannot be empty"),
        ({"input": " "}, "Input cannot be empty or whitespace only"),
        ({"input": ["a", " "]}, "Input at index 1 cannot be empty or whitespace only"),
        ({"input": [[1], []]}, "input_ids cannot be empty."),
        ({"input": [-(2**40)]}, f"input_ids contains out-of-vocabulary token id {-(2**40)}; valid range is [0, 1000)."),
        ({"input": "a", "dimensions": 5}, "Provided dimensions are greater than max embedding dimension: 4"),
        ({"input": "REFUSE so"}, "so"),
    ],
)
def test_refusals(vectors: Live, body: dict[str, Any], message: str) -> None:
    refused = vectors.client.post("/v1/embeddings", json=body)
    expected = {"object": "error", "message": message, "type": "BadRequestError", "param": None, "code": 400}
    assert (refused.status_code, refused.json()) == (400, expected)


def test_unreadable_bodies_and_models_that_generate(vectors: Live, live: Live) -> None:
    for wrong in ({}, {"input": 5}, {"input": [1, "a"]}, {"input": [1, [2]]}, {"input": "a", "encoding_format": "hex"}):
        refused = vectors.client.post("/v1/embeddings", json=wrong)
        assert (refused.status_code, refused.json()["type"]) == (400, "Bad Request")
    other = live.client.post("/v1/embeddings", json={"input": "a"}).json()
    assert other["type"] == "BadRequestError" and other["message"].startswith("This model does not appear to be an")
