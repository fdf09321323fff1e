"""Every row of the contract's error tables (§2.3, §2.4) on the default model, plain and streamed; then more abuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from live_client import Api, Json, greedy

V, C = 49152, 8192
"""Vocabulary and context of the default model."""
LONGEST = C - 6
KEYS = (
    "`max_new_tokens`, `stop`, `stop_token_ids`, `stop_regex`, `temperature`, `top_p`, `top_k`, `min_p`, "
    "`frequency_penalty`, `presence_penalty`, `repetition_penalty`, `min_new_tokens`, `n`, `json_schema`, `regex`, "
    "`ebnf`, `structural_tag`, `ignore_eos`, `skip_special_tokens`, `spaces_between_special_tokens`, `no_stop_trim`, "
    "`stream_interval`, `logit_bias`, `sampling_seed`, `custom_params`, `beam_width`, `watermark`, `choice`"
)
NOTHING_GIVEN = "Either text, input_ids or input_embeds should be provided."
EMPTY = "input_ids cannot be empty."


def _sampling(**params: Any) -> Json:
    return {"text": "a", "sampling_params": params}


def _more(**fields: Any) -> Json:
    return {"text": "a", **fields}


def _too_many(prompt: int, new: int) -> str:
    return (
        f"Requested token count exceeds the model's maximum context length of {C} tokens. You requested a total of "
        f"{prompt + new} tokens: {prompt} tokens from the input messages and {new} tokens for the completion. Please "
        "reduce the number of tokens in the input messages or the completion to fit within the limit."
    )


def _foreign(name: str, token: int) -> str:
    return f"{name} contains out-of-vocabulary token id {token}; valid range is [0, {V})."


def _list_with_n(name: str) -> str:
    return f"Cannot use list {name} with parallel_sample_num > 1"


INVALID: list[tuple[Json, str]] = [
    ({}, NOTHING_GIVEN),
    ({"text": None, "input_ids": None}, NOTHING_GIVEN),
    ({"text": "a", "input_ids": [1], "input_embeds": [[0.5]]}, NOTHING_GIVEN),
    ({"input_ids": []}, EMPTY),
    ({"text": ""}, EMPTY),
    ({"text": ["a", ""], "sampling_params": {"max_new_tokens": 2}}, EMPTY),
    ({"input_ids": [[1], []], "sampling_params": {"max_new_tokens": 2}}, EMPTY),
    ({"input_ids": [1, V, 2]}, _foreign("input_ids", V)),
    ({"input_ids": [-1]}, _foreign("input_ids", -1)),
    ({"input_ids": [2**63 - 1]}, _foreign("input_ids", 2**63 - 1)),
    ({"input_ids": [5] * C}, f"The input ({C} tokens) is longer than the model's context length ({C} tokens)."),
    ({"input_ids": [5] * 10**5}, f"The input (100000 tokens) is longer than the model's context length ({C} tokens)."),
    ({"input_ids": [5] * 8000, "sampling_params": {"max_new_tokens": 193}}, _too_many(8000, 193)),
    (_sampling(max_new_tokens=2**63), _too_many(1, 2**63)),
    (_more(input_embeds=[[0.5]], text=None),
     "input_embeds is provided while disable_radix_cache is False. Please add `--disable-radix-cache` when you launch "
     "the server if you want to use input_embeds as inputs."),
    ({"text": ["a", "b"], "rid": ["x", "x"]}, "Duplicate request IDs detected within the request: ['x']"),
    ({"text": ["a", "b"], "rid": ["x"]},
     "The specified rids length mismatch with the batch_size for batch processing."),
    ({"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]},
     "The parallel_sample_num should be the same for all samples in sample params."),
    (_more(sampling_params={"n": 2}, return_logprob=[True]), _list_with_n("return_logprob")),
    (_more(sampling_params={"n": 2}, logprob_start_len=[0]), _list_with_n("logprob_start_len")),
    (_more(sampling_params={"n": 2}, top_logprobs_num=[1]), _list_with_n("top_logprobs_num")),
    (_more(sampling_params={"n": 2}, token_ids_logprob=[[1]]), _list_with_n("token_ids_logprob")),
    ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params has 1 entries, but the batch size is 2."),
    ({"text": ["a", "b"], "return_logprob": []}, "return_logprob has 0 entries, but the batch size is 2."),
    ({"text": ["a", "b"], "top_logprobs_num": [1]}, "top_logprobs_num has 1 entries, but the batch size is 2."),
    (_sampling(n=None), "n must be at least 1, got null."),
    (_sampling(n=0), "n must be at least 1, got 0."),
    (_sampling(n=-3), "n must be at least 1, got -3."),
    (_sampling(n=2**62), f"a call may have at most 65536 items, got 1 prompts times n={2**62}."),
    (_more(return_logprob=True, logprob_start_len=-2), "logprob_start_len must be in [-1, 1], got -2."),
    (_more(return_logprob=True, top_logprobs_num=1_000_000), f"top_logprobs_num must be in [0, {V}], got 1000000."),
    (_more(return_logprob=True, top_logprobs_num=-1), f"top_logprobs_num must be in [0, {V}], got -1."),
    (_more(return_logprob=True, token_ids_logprob=[1, V]), _foreign("token_ids_logprob", V)),
    (_more(return_logprob=True, token_ids_logprob=[-7]), _foreign("token_ids_logprob", -7)),
    (_more(return_logprob=True, token_ids_logprob=[[1], 2]), "token_ids_logprob must be a flat list of integers."),
    (_more(return_logprob=True, token_ids_logprob=[[1]]), "token_ids_logprob must be a flat list of integers."),
    (_more(lora_path="x"),
     "LoRA adapter 'x' was requested, but LoRA is not enabled. Please launch the server with --enable-lora flag and "
     "preload adapters using --lora-paths or /load_lora_adapter endpoint."),
    (_more(return_hidden_states=True),
     "The server is not configured to return hidden states. Please set `--return-hidden-states-mode last`, "
     "`--return-hidden-states-mode full`, or the legacy `--enable-return-hidden-states` flag."),
    (_more(custom_logit_processor="{}"),
     "The server is not configured to enable custom logit processor. Please set `--enable-custom-logit-processor` to "
     "enable this feature."),
    (_more(priority=2**63),
     "priority must be a signed 64-bit integer between -9223372036854775808 and 9223372036854775807"),
    (_more(session_id="s", session_params={"id": "t"}), "session_id and session_params cannot both be set."),
    (_sampling(json_schema="{}", regex="a"), "Only one of json_schema, regex, ebnf, or structural_tag can be set."),
    (_sampling(stop_regex="(a"), "invalid stop_regex '(a': missing ), unterminated subpattern at position 0"),
    (_sampling(max_new_tokens=-1), "max_new_tokens must be at least 0, got -1."),
    (_sampling(min_new_tokens=-1), "min_new_tokens must be in [0, max_new_tokens], got -1."),
    (_sampling(min_new_tokens=5, max_new_tokens=4), "min_new_tokens must be in [0, max_new_tokens(4)], got 5."),
    (_sampling(temperature=-0.5), "temperature must be a non-negative finite number, got -0.5."),
    (_sampling(top_p=0), "top_p must be in (0, 1], got 0.0."),
    (_sampling(top_p=1.5), "top_p must be in (0, 1], got 1.5."),
    (_sampling(top_k=0), "top_k must be -1 (disable) or at least 1, got 0."),
    (_sampling(top_k=-2), "top_k must be -1 (disable) or at least 1, got -2."),
    (_sampling(min_p=1.5), "min_p must be in [0, 1], got 1.5."),
    (_sampling(frequency_penalty=2.5), "frequency_penalty must be in [-2, 2], got 2.5."),
    (_sampling(presence_penalty=-3), "presence_penalty must be in [-2, 2], got -3.0."),
    (_sampling(repetition_penalty=0), "repetition_penalty must be in (0, 2] (1.0 = no penalty), got 0.0."),
    (_sampling(stop=["x"] * 33), "at most 32 stop strings are allowed, got 33"),
    (_sampling(stop_regex=["x"] * 33), "at most 32 stop_regex patterns are allowed, got 33"),
    (_sampling(stop_regex="é" * 129), "stop_regex is 258 bytes, over the 256-byte limit"),
    (_sampling(logit_bias={str(V): 1}), f"logit_bias must has keys in [0, {V - 1}], got {V}."),
    (_sampling(logit_bias={"-1": 1}), f"logit_bias must has keys in [0, {V - 1}], got -1."),
    (_sampling(logit_bias={"a": 1}), f"logit_bias must has keys in [0, {V - 1}], got a."),
    (_sampling(sampling_seed=2**63), f"sampling_seed must be in [-2**63, 2**63 - 1], got {2**63}."),
    (_sampling(beam_width=0), "beam_width must be at least 1, got 0."),
]  # fmt: skip
"""Shape A, found at the door: §2.3 E4 to E42 and §6.1."""

FOUND_BY_THE_SCHEDULER: list[tuple[Json, str]] = [
    ({"input_ids": [5] * LONGEST},
     f"Input length ({LONGEST} tokens) exceeds the maximum allowed length ({LONGEST} tokens). Use a shorter input or "
     "enable --allow-auto-truncate."),
    ({"input_ids": [5] * 3, "return_logprob": True, "logprob_start_len": 4},
     "req.logprob_start_len=4 is higher than the number of input tokens len(req.origin_input_ids)=3. Please use a "
     "smaller logprob_start_len."),
    (_sampling(json_schema="INVALID"),
     "Failed to compile json grammar: Expecting value: line 1 column 1 (char 0)"),
    (_sampling(ebnf="INVALID"), "Failed to compile ebnf grammar: Expected ::= at line 1, 'INVALID' ^ ''"),
    (_sampling(structural_tag="{}"),
     "Failed to compile structural_tag grammar: Object missing required field `structures`"),
    (_sampling(regex="a\0"), r"Invalid regex: NUL bytes (\u0000) are not allowed"),
]  # fmt: skip
"""Shape A that a stream shows as an ordinary chunk (E16, E26, E40)."""

MISTYPED: list[tuple[Json, str]] = [
    (_sampling(foo=1), f"unknown field `foo`, expected one of {KEYS}"),
    ({"text": "a", "stream": "true"}, 'invalid type: string "true", expected a boolean'),
    ({"text": "a", "stream": "yes"}, 'invalid type: string "yes", expected a boolean'),
    ({"text": "a", "stream": 1}, "invalid type: integer `1`, expected a boolean"),
    (_more(return_hidden_states="last"),
     'invalid type: string "last", expected a value or an array of values for BoolOrList'),
    (_more(return_logprob="true"),
     'invalid type: string "true", expected a value or an array of values for BoolOrList'),
    (_more(return_logprob=[1]), "invalid type: integer `1`, expected a boolean"),
    (_more(priority="3"), 'invalid type: string "3", expected i64'),
    (_more(priority=True), "invalid type: boolean `true`, expected i64"),
    (_more(logprob_start_len=2.0),
     "invalid type: floating point `2.0`, expected a value or an array of values for Int64OrList"),
    (_more(top_logprobs_num=["3"]), 'invalid type: string "3", expected i64'),
    (_sampling(temperature="0.5"), 'invalid type: string "0.5", expected f64'),
    (_sampling(temperature=True), "invalid type: boolean `true`, expected f64"),
    (_sampling(max_new_tokens=1.5), "invalid type: floating point `1.5`, expected i64"),
    (_sampling(max_new_tokens=2.0), "invalid type: floating point `2.0`, expected i64"),
    (_sampling(sampling_seed=1.5), "invalid type: floating point `1.5`, expected i64"),
    (_sampling(stop=3), "invalid type: integer `3`, expected a value or an array of values for StringOrList"),
    (_sampling(stop=["a", 3]), "invalid type: integer `3`, expected a string"),
    (_sampling(stop_token_ids=3), "invalid type: integer `3`, expected a sequence"),
    (_sampling(stop_token_ids=[1, "a"]), 'invalid type: string "a", expected i64'),
    (_sampling(json_schema={}), "invalid type: map, expected a string"),
    (_sampling(logit_bias=[1]), "invalid type: sequence, expected a map"),
    (_sampling(logit_bias={"1": "a"}), 'invalid type: string "a", expected f64'),
    (_sampling(ignore_eos=0), "invalid type: integer `0`, expected a boolean"),
    ({"text": ["a"], "sampling_params": [None]}, "invalid type: null, expected struct SamplingParams"),
]  # fmt: skip
"""Shape B: E10, E11 and the rows of §2.4."""

UNREADABLE: list[tuple[str | bytes | Any, str]] = [
    (b"{", "JSON decode error"),
    (b'{"text": "a", "x": NaN}', "JSON decode error"),
    (b'{"text": "a", "sampling_params": {"temperature": Infinity}}', "JSON decode error"),
    (b'{"text": "a", "sampling_params": {"temperature": 1e400}}', "JSON decode error"),
    (b'{"text": "\xff\xfe"}', "JSON decode error"),
    (b'{"text": "\\ud800"}', "JSON decode error"),
    (b'{"text": "a", "sampling_params": {"stop": "\\udc00"}}', "JSON decode error"),
    (b'{"text": "a", "rid": "a\\ud800"}', "JSON decode error"),
    (b"[" * 100_000, "JSON decode error"),
    (b'{"text": "a", "custom_labels": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "JSON decode error"),
    (b'{"text": "a", "ignored": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON decode error"),
    (b'{"text": "a", "sampling_params": {"max_new_tokens": 1' + b"0" * 5000 + b"}}", "JSON decode error"),
    (b"", "Field required"),
    ([1], ""), ("text", ""), (5, ""), (None, ""),
    ({"text": 5}, ""), ({"text": {}}, ""), ({"text": ["a", 1]}, ""),
    ({"input_ids": "abc"}, "must be list or null; got str"),
    ({"input_ids": 5}, "must be list or null; got int"),
    ({"input_ids": [1, "a"]}, "elements must be int or list; got str"),
    ({"input_ids": [1.5]}, "elements must be int or list; got float"),
    ({"input_ids": [2**63]}, "contains non-int64 element"),
    ({"input_ids": [2**64]}, "contains non-int64 element"),
    ({"text": "a", "stream": "x"}, ""), ({"text": "a", "stream": [1]}, ""), ({"text": "a", "stream": None}, ""),
    (_more(rid=1), ""), (_more(priority=1.5), ""), (_more(priority=2**64), ""),
    (_more(sampling_params="x"), ""), (_more(sampling_params=[1]), ""), (_more(session_params="x"), ""),
    (_more(lora_path=1), ""), (_more(token_ids_logprob="x"), ""), (_more(return_logprob=1.5), ""),
    *((_more(**{name: None}), "") for name in (
        "return_text_in_logprobs", "log_metrics", "return_hidden_states", "return_prompt_token_ids",
        "return_routed_experts", "require_reasoning", "no_logs", "background", "return_entropy",
        "return_flat_raw_top_logprobs", "routed_experts_start_len",
    )),
]  # fmt: skip
"""Shape C: E1 to E7 and §2.4."""


def _name(case: object) -> str:
    return (repr(case) if isinstance(case, dict | list | bytes) else str(case))[:60]


def _streamed(body: Json) -> Json:
    return {"stream": True, **body}


@pytest.mark.parametrize(("body", "message"), INVALID + FOUND_BY_THE_SCHEDULER, ids=_name)
def test_invalid(default_api: Api, body: Json, message: str) -> None:
    answer = default_api.post(body)
    assert (answer.status_code, answer.json()) == (400, {"error": {"message": message}})


@pytest.mark.parametrize(("body", "message"), INVALID, ids=_name)
def test_invalid_streamed(default_api: Api, body: Json, message: str) -> None:
    error = {"message": message, "type": "invalid_request_error", "code": 400, "retryable": False}
    found = [chunk["error"] for chunk in default_api.stream(**body) if "error" in chunk]
    assert found == [error]


@pytest.mark.parametrize(("body", "message"), FOUND_BY_THE_SCHEDULER, ids=_name)
def test_found_by_the_scheduler_streamed(default_api: Api, body: Json, message: str) -> None:
    (chunk,) = default_api.stream(**body)
    finish = {"type": "abort", "message": message, "status_code": 400, "err_type": None}
    assert (chunk["text"], chunk["meta_info"]["finish_reason"]) == ("", finish)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("body", "message"), MISTYPED, ids=_name)
def test_mistyped(default_api: Api, body: Json, message: str, streamed: bool) -> None:
    answer = default_api.post(_streamed(body) if streamed else body)
    assert (answer.status_code, answer.json()) == (400, {"error": message})


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("body", "message"), UNREADABLE, ids=_name)
def test_unreadable(default_api: Api, body: Any, message: str, streamed: bool) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(_streamed(body) if _both(body, streamed) else body).encode()
    answer = default_api.http.post("/generate", content=raw, headers={"content-type": "application/json"})
    told = answer.json()
    assert message in told.pop("message")
    assert (answer.status_code, told) == (
        400, {"object": "error", "type": "Bad Request", "param": None, "code": 400},
    )  # fmt: skip


def _both(body: Any, streamed: bool) -> bool:
    return streamed and isinstance(body, dict)


def test_empty_batches_and_other_doors(default_api: Api) -> None:
    assert default_api.generate(text=[]) == []
    assert default_api.stream(text=[]) == []
    plain = default_api.http.post("/generate", content=b'{"text": "a"}', headers={"content-type": "text/plain"})
    assert (plain.status_code, plain.json()["type"]) == (400, "Bad Request")
    wrong = default_api.http.get("/generate")
    assert (wrong.status_code, wrong.json()) == (405, {"detail": "Method Not Allowed"})
    assert set(wrong.headers["allow"].split(", ")) == {"POST", "PUT"}
    assert default_api.http.put("/generate", json={"text": "a", **_few()}).status_code == 200


def _few(**more: Any) -> Json:
    return {"sampling_params": {"max_new_tokens": 2, **more}}


@pytest.mark.parametrize("streamed", [False, True])
def test_a_rid_that_is_running(default_api: Api, streamed: bool) -> None:
    message = "Duplicate request ID detected: twin"
    with default_api.open_stream(text="a", rid="twin", sampling_params=greedy(4000)) as chunks:
        next(chunks)
        body = {"text": "b", "rid": "twin", **_few()}
        if streamed:
            (chunk,) = default_api.stream(**body)
            assert chunk["error"]["message"] == message
        else:
            answer = default_api.post(body)
            assert (answer.status_code, answer.json()) == (400, {"error": {"message": message}})
    default_api.wait_idle()
    assert default_api.generate(**body)["meta_info"]["id"] == "twin"


@pytest.mark.parametrize("parameters", [
    {"sampling_seed": -1}, {"sampling_seed": -(2**63)}, {"sampling_seed": 2**63 - 1},
    {"top_k": 2**63 - 1}, {"top_k": 2**64 - 1}, {"temperature": 1e308}, {"temperature": 1e-320}, {"top_p": 1e-320},
    {"stop_token_ids": list(range(40_000, 50_000))},
    {"stop_token_ids": [-1, V, 2**63 - 1, 2**64 - 1, -(2**63)], "min_new_tokens": 2},
    {"logit_bias": {"11": 1e308}, "temperature": 0.3}, {"logit_bias": {str(i): -1e308 for i in range(1000)}},
    {"repetition_penalty": 1e-320, "temperature": 0.7}, {"stream_interval": 2**63}, {"stream_interval": -5},
    {"stop_regex": "(a+)+$"}, {"stop_regex": ["(x*)*y", "(a|a)*b", ""]}, {"stop": ["", "\0", "🙂" * 10_000]},
    {"custom_params": {"a": [1, {"b": None}]}}, {"spaces_between_special_tokens": False},
    dict.fromkeys((
        "max_new_tokens", "stop", "stop_token_ids", "stop_regex", "temperature", "top_p", "top_k", "min_p",
        "frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens", "json_schema", "regex", "ebnf",
        "structural_tag", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim",
        "stream_interval", "logit_bias", "sampling_seed", "custom_params", "beam_width", "watermark",
    )) | {"max_new_tokens": 2},
], ids=_name)  # fmt: skip
def test_strange_but_allowed(default_api: Api, parameters: Json) -> None:
    body = {"text": "aaaa", "return_logprob": True, "top_logprobs_num": 3, **_few(**parameters)}
    answer = default_api.generate(**body)
    assert answer["meta_info"]["finish_reason"].get("matched") != "NaN happened"
    assert 1 <= answer["meta_info"]["completion_tokens"] <= 2
    assert default_api.stream(**body)[-1]["meta_info"]["finish_reason"] is not None


def test_ignored_and_null_fields(default_api: Api) -> None:
    ignored = {"model": "x", "stream_options": {"include_usage": True}, "parallel_batch": 1, "nested": [[[[{}]]]]}
    nulls = dict.fromkeys((
        "input_ids", "sampling_params", "rid", "return_logprob", "logprob_start_len", "top_logprobs_num",
        "token_ids_logprob", "session_params", "session_id", "lora_path", "custom_logit_processor", "priority",
        "extra_key", "cache_salt", "routed_dp_rank", "custom_labels", "image_data", "video_data", "audio_data",
    ))  # fmt: skip
    answer = default_api.generate(**{**nulls, **ignored, **_few(), "text": "a", "image_data": [], "lora_path": ""})
    assert answer["meta_info"]["completion_tokens"] <= 2


@pytest.mark.parametrize("make", [lambda: "word " * 1_000_000, lambda: "\n" * 1_000_000, lambda: "a" * 300_000])
def test_a_huge_text(default_api: Api, make: Callable[[], str]) -> None:
    answer = default_api.post({"text": make()})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].endswith(
        f"tokens) is longer than the model's context length ({C} tokens)."
    )


def test_afterwards_the_server_is_idle_and_answers(default_api: Api) -> None:
    default_api.wait_idle()
    answer = default_api.generate(text="The capital of France is", sampling_params=greedy(4))
    assert "Paris" in answer["text"]
    assert default_api.http.get("/health_generate").status_code == 200
