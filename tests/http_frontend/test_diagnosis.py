"""Refusals of /generate bodies, row by row of the contract's §2.3 and §2.4, and hypothesis against the decoder."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from http_frontend.bodies import GenerateBody, SamplingBody
from http_frontend.errors import RefusedError, error_body
from http_frontend.generate import read_generate


def refusal(body: bytes | dict[str, Any], declared: str = "application/json") -> RefusedError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(RefusedError) as caught:
        read_generate(raw, declared)
    return caught.value


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b'{"text": ', "JSON decode error"),
        (b'{"text": NaN}', "JSON decode error"),
        (b'{"text": "a", "x": Infinity}', "JSON decode error"),
        (b'{"text": "\\ud800"}', "JSON decode error"),
        (b'{"text": "a", "priority": 18446744073709551616}', "JSON decode error"),
        (b'{"text": "a", "unknown": [{"x": -9223372036854775809}]}', "JSON decode error"),
        (b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON decode error"),
        (b'{"input_ids": [1' + b"0" * 5000 + b"]}", "JSON decode error"),
        (b"", "Field required"),
        (b"  \n", "Field required"),
        (b"[]", "object"),
        (b'"text"', "object"),
        (b"3", "object"),
        (b"null", "object"),
        (b'{"text": 5}', "text"),
        (b'{"text": {}}', "text"),
        (b'{"text": ["a", 5]}', "text"),
        (b'{"input_ids": "abc"}', "must be list or null; got str"),
        (b'{"input_ids": 5}', "must be list or null; got int"),
        (b'{"input_ids": ["a"]}', "elements must be int or list; got str"),
        (b'{"input_ids": [1, 2.0]}', "elements must be int or list; got float"),
        (b'{"input_ids": [[1, "a"]]}', "elements must be int or list; got str"),
        (b'{"input_ids": [18446744073709551616]}', "contains non-int64 element"),
        (b'{"text": "a", "stream": "x"}', "stream"),
        (b'{"text": "a", "stream": [1]}', "stream"),
        (b'{"text": "a", "stream": null}', "stream"),
        (b'{"text": "a", "rid": 1}', "rid"),
        (b'{"text": "a", "priority": 1.5}', "priority"),
        (b'{"text": "a", "sampling_params": "x"}', "sampling_params"),
        (b'{"text": "a", "sampling_params": [1]}', "sampling_params"),
        (b'{"text": "a", "session_params": "x"}', "session_params"),
        (b'{"text": "a", "lora_path": 1}', "lora_path"),
        (b'{"text": "a", "token_ids_logprob": "x"}', "token_ids_logprob"),
        (b'{"text": "a", "return_logprob": 1.5}', "return_logprob"),
        (b'{"text": "a", "return_hidden_states": null}', "return_hidden_states"),
        (b'{"text": "a", "routed_experts_start_len": null}', "routed_experts_start_len"),
    ],
)
def test_shape_c(body: bytes, part: str) -> None:
    refused = refusal(body)
    assert (refused.shape, refused.status) == ("C", 400)
    assert part in refused.message
    assert error_body(refused) == {
        "object": "error",
        "message": refused.message,
        "type": "Bad Request",
        "param": None,
        "code": 400,
    }


STRING_OR_LIST = "a value or an array of values for StringOrList"


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temperature": "0.5"}, 'invalid type: string "0.5", expected f64'),
        ({"temperature": True}, "invalid type: boolean `true`, expected f64"),
        ({"max_new_tokens": 1.5}, "invalid type: floating point `1.5`, expected i64"),
        ({"max_new_tokens": 2.0}, "invalid type: floating point `2.0`, expected i64"),
        ({"n": True}, "invalid type: boolean `true`, expected i64"),
        ({"stop": 3}, f"invalid type: integer `3`, expected {STRING_OR_LIST}"),
        ({"stop": ["a", 3]}, "invalid type: integer `3`, expected a string"),
        ({"stop_token_ids": 3}, "invalid type: integer `3`, expected a sequence"),
        ({"stop_token_ids": [1, "a"]}, 'invalid type: string "a", expected i64'),
        ({"json_schema": {}}, "invalid type: map, expected a string"),
        ({"logit_bias": [1]}, "invalid type: sequence, expected a map"),
        ({"logit_bias": {"1": "a"}}, 'invalid type: string "a", expected f64'),
        ({"logit_bias": {"1": None}}, "invalid type: null, expected f64"),
        ({"ignore_eos": 1}, "invalid type: integer `1`, expected a boolean"),
        ({"custom_params": "x"}, 'invalid type: string "x", expected a map'),
        ({"sampling_seed": "1"}, 'invalid type: string "1", expected i64'),
        ([{}, None], "invalid type: null, expected struct SamplingParams"),
        ([{}, {"top_p": "1"}], 'invalid type: string "1", expected f64'),
    ],
)
def test_shape_b_in_sampling_params(sampling: Any, message: str) -> None:
    refused = refusal({"text": "a", "sampling_params": sampling})
    assert error_body(refused) == {"error": message}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stream": "true"}, 'invalid type: string "true", expected a boolean'),
        ({"stream": "yes"}, 'invalid type: string "yes", expected a boolean'),
        ({"stream": 1}, "invalid type: integer `1`, expected a boolean"),
        ({"priority": "3"}, 'invalid type: string "3", expected i64'),
        ({"priority": True}, "invalid type: boolean `true`, expected i64"),
        (
            {"logprob_start_len": 2.0},
            "invalid type: floating point `2.0`, expected a value or an array of values for Int64OrList",
        ),
        ({"top_logprobs_num": [1, "2"]}, 'invalid type: string "2", expected i64'),
        (
            {"return_logprob": 1},
            "invalid type: integer `1`, expected a value or an array of values for BoolOrList",
        ),
        (
            {"return_hidden_states": "last"},
            'invalid type: string "last", expected a value or an array of values for BoolOrList',
        ),
        ({"token_ids_logprob": [[1, "2"]]}, 'invalid type: string "2", expected i64'),
    ],
)
def test_shape_b_at_top_level(fields: dict[str, Any], message: str) -> None:
    assert error_body(refusal({"text": "a", **fields})) == {"error": message}


def test_unknown_sampling_key_is_refused_and_the_known_ones_are_listed() -> None:
    refused = refusal({"text": "a", "sampling_params": {"temperature": 1, "foo": 2, "bar": 3}})
    known = (
        "`max_new_tokens`, `stop`, `stop_token_ids`, `stop_regex`, `temperature`, `top_p`, `top_k`, `min_p`, "
        "`frequency_penalty`, `presence_penalty`, `repetition_penalty`, `min_new_tokens`, `n`, `json_schema`, "
        "`regex`, `ebnf`, `structural_tag`, `ignore_eos`, `skip_special_tokens`, `spaces_between_special_tokens`, "
        "`no_stop_trim`, `stream_interval`, `logit_bias`, `sampling_seed`, `custom_params`, `beam_width`, "
        "`watermark`, `choice`"
    )
    assert refused.shape == "B"
    assert refused.message == f"unknown field `foo`, expected one of {known}"


def test_a_useless_top_level_field_wins_over_a_strict_mismatch() -> None:
    refused = refusal({"stream": "true", "sampling_params": {"foo": 1}, "rid": 1})
    assert (refused.shape, "rid" in refused.message) == ("C", True)


@pytest.mark.parametrize("declared", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
def test_other_content_types_are_not_parsed(declared: str) -> None:
    assert refusal({"text": "a"}, declared).shape == "C"


@pytest.mark.parametrize("declared", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.x+json"])
def test_json_content_types(declared: str) -> None:
    assert read_generate(b'{"text":"a"}', declared).text == "a"


def test_what_real_clients_send_is_accepted() -> None:
    body = read_generate(
        json.dumps(
            {
                "text": "a",
                "model": "x",
                "stream_options": {"a": [1]},
                "parallel_batch": True,
                "image_data": None,
                "lora_path": "",
                "sampling_params": {"stop": [], "regex": None, "temperature": 0, "stop_token_ids": [], "top_p": None},
            }
        ).encode(),
        "application/json",
    )
    assert isinstance(body.sampling_params, SamplingBody)
    assert body.sampling_params.temperature == 0
    assert body.sampling_params.regex is None


_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-2, 2) | st.sampled_from(["x", "true", "3", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["n", "a", "1"]), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(GenerateBody.__struct_fields__), _values, max_size=3))
def test_whatever_the_decoder_refuses_gets_a_reason_that_is_the_contracts(fields: dict[str, Any]) -> None:
    """The typed decoder and the diagnosis must agree on what is wrong: else the last resort's words show."""
    try:
        read_generate(json.dumps(fields).encode(), "application/json")
    except RefusedError as refused:
        assert refused.shape in ("B", "C")
        assert "Expected `" not in refused.message


@given(st.dictionaries(st.sampled_from(SamplingBody.__struct_fields__), _values, min_size=1, max_size=3))
def test_sampling_params_are_always_shape_b(fields: dict[str, Any]) -> None:
    try:
        read_generate(json.dumps({"text": "a", "sampling_params": fields}).encode(), "application/json")
    except RefusedError as refused:
        assert refused.shape == "B"
