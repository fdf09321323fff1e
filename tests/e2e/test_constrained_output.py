"""Constrained output over HTTP: with the default model, which is sensible, and with a random one, which is not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from live_client import Api

from engine.bench.live_server import running_server

CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "country": {"enum": ["France", "Spain"]},
        "rivers": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 2},
        "population": {"type": "integer", "minimum": 1, "maximum": 99999999},
    },
    "required": ["name", "country", "rivers", "population"],
    "additionalProperties": False,
}
PAIR = r"""
    root ::= "{" pair ("," pair)? "}"
    pair ::= "\"" [a-z]{1,5} "\":" value  # one of two
    value ::= [0-9]{1,4}
        | "true"
"""


@pytest.fixture(scope="module")
def compact(tiny_model: Path) -> Iterator[Api]:
    """The random model, without whitespace in JSON: it would never come to the end of that."""
    flags = ("--dtype", "float32", "--max-total-tokens", "40000", "--constrained-json-disable-any-whitespace")
    with running_server(
        *flags, "--grammar-backend", "llguidance", model=tiny_model, env={"TOKENMILL_STRICT": "1"}
    ) as server:
        yield Api(server.url)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_of_the_default_model(default_api: Api, temperature: float) -> None:
    sampling = {"json_schema": json.dumps(CITY), "temperature": temperature, "sampling_seed": 4, "max_new_tokens": 200}
    body = {"text": "Describe the capital of France in JSON:\n", "sampling_params": sampling}
    answer = default_api.generate(**body)
    assert jsonschema_rs.is_valid(CITY, json.loads(answer["text"]))
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"
    chunks = default_api.stream(**body)
    assert chunks[-1]["text"] == answer["text"] and chunks[-1]["output_ids"] == answer["output_ids"]


def test_two_words(default_api: Api) -> None:
    answer = default_api.generate(
        text="Question: Is Paris the Capital of France? Answer:", return_logprob=True, top_logprobs_num=5,
        return_text_in_logprobs=True, sampling_params={"regex": "( Yes| No)", "max_new_tokens": 1},
    )  # fmt: skip
    (top,) = answer["meta_info"]["output_top_logprobs"]
    assert {" Yes", " No"} <= {text for _, _, text in top}


def test_random_models_keep_to_their_grammars(compact: Api) -> None:
    for seed in range(12):
        sampling = {"temperature": 1.0, "sampling_seed": seed, "max_new_tokens": 400}
        answers = compact.generate(
            text=["a", "b", "c"],
            sampling_params=[
                sampling | {"json_schema": json.dumps(CITY)},
                sampling | {"regex": "^[a-c]{2}(x|yy)[0-9]{1,3}$"},
                sampling | {"ebnf": PAIR},
            ],
        )
        assert jsonschema_rs.is_valid(CITY, json.loads(answers[0]["text"]))
        assert re.fullmatch("[a-c]{2}(x|yy)[0-9]{1,3}", answers[1]["text"])
        assert re.fullmatch(r'\{"[a-z]{1,5}":([0-9]{1,4}|true)(,"[a-z]{1,5}":([0-9]{1,4}|true))?\}', answers[2]["text"])
        assert all(answer["meta_info"]["finish_reason"]["type"] == "stop" for answer in answers)


def test_several_samples(compact: Api) -> None:
    body = {"text": "a", "sampling_params": {"n": 3, "regex": "[a-f]{4}", "temperature": 1.0, "sampling_seed": 3}}
    texts = [answer["text"] for answer in compact.generate(**body)]
    assert all(re.fullmatch("[a-f]{4}", text) for text in texts) and len(set(texts)) > 1
    last = {chunk["index"]: chunk["text"] for chunk in compact.stream(**body)}
    assert [last[i] for i in range(3)] == texts


def test_only_the_end_of_a_grammar_ends_what_ignores_ends(compact: Api) -> None:
    sampling = {"regex": "[a-f]{4}", "ignore_eos": True, "max_new_tokens": 50}
    answer = compact.generate(text="a", sampling_params=sampling)
    assert re.fullmatch("[a-f]{4}", answer["text"])
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": answer["output_ids"][-1]}


def test_structural_tags(compact: Api) -> None:
    content = {"type": "json_schema", "json_schema": {"type": "integer", "minimum": 0, "maximum": 99}}
    form = {"type": "triggered_tags", "triggers": ["["], "tags": [{"begin": "[c]", "content": content, "end": "[/c]"}]}
    tags = json.dumps({"format": form | {"at_least_one": True, "stop_after_first": True}})
    ids = compact.post({"prompt": "[ 0123456789", "add_special_tokens": False}, "/tokenize").json()["tokens"]
    sampling = {"structural_tag": tags, "temperature": 1.0, "sampling_seed": 1, "max_new_tokens": 2000}
    answer = compact.generate(text="a", sampling_params=sampling | {"logit_bias": dict.fromkeys(map(str, ids), 100.0)})
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"
    assert re.fullmatch(r"[^\[]*\[c\]\d{1,2}\[/c\]", answer["text"])


def test_neighbours_have_the_same_bits(compact: Api) -> None:
    bodies: list[dict[str, Any]] = [
        {"text": f"The dog {number}", "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 3,
         "sampling_params": {"max_new_tokens": 40, "temperature": number % 2, "sampling_seed": number}
         | ({"regex": "[a-z ]{60,}"} if number % 3 == 1 else {})}
        for number in range(12)
    ]  # fmt: skip

    def answer(body: dict[str, Any]) -> Any:
        found = compact.generate(**body)
        meta = found["meta_info"]
        return found["text"], found["output_ids"], meta["output_token_logprobs"], meta["output_top_logprobs"]

    alone = [answer(body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        assert list(pool.map(answer, bodies)) == alone


def test_what_does_not_compile_hurts_nobody(compact: Api) -> None:
    with compact.open_stream(text="a", sampling_params={"max_new_tokens": 300, "ignore_eos": True}) as chunks:
        next(chunks)
        for schema in ("INVALID", '"INVALID"', "[" * 10_000, json.dumps({"enum": ["x" * 30] * 2000})):
            status = compact.post({"text": "a", "sampling_params": {"json_schema": schema, "max_new_tokens": 2}})
            assert status.status_code == (200 if "enum" in schema else 400)
        assert [*chunks][-1]["meta_info"]["finish_reason"]["type"] == "length"
    assert compact.wait_idle()["num_grammar_reqs"] == 0
    compact.flush()
    assert compact.http.get("/v1/loads").json()["loads"][0]["queues"]["grammar"] == 0
