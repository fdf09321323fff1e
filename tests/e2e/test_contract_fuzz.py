"""Bodies made of fields that exist with values that mostly do not fit: each gets an answer, and the server lives."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_client import Api, parse_events

NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 420, 421, 1_000_000, 2**31, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 0.0, -0.0,
    0.5, 1.0, 2.0, -1.5, 1e-300, 1e308, "", "a", "true", "3", "é🙂", "\0", "\u2028", "(", "[a-", "a" * 300, [], [[]],
    {}, [None], ["a"], [1], [1.5], [1, 2], [[1], [2]], [1, [2]], ["a", "b"], [True, False], [{}], {"1": 1}, {"a": "b"},
    {"0": -100.0, "420": 1e308}, [{"max_new_tokens": 1}, {"top_k": 3}],
]  # fmt: skip
SAMPLING = (
    "max_new_tokens", "stop", "stop_token_ids", "stop_regex", "temperature", "top_p", "top_k", "min_p",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens", "n", "json_schema", "regex",
    "ebnf", "structural_tag", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim",
    "stream_interval", "logit_bias", "sampling_seed", "custom_params", "beam_width", "watermark",
    "choice", "other",
)  # fmt: skip
FIELDS = (
    "text", "input_ids", "input_embeds", "sampling_params", "rid", "return_logprob", "logprob_start_len",
    "top_logprobs_num", "token_ids_logprob", "return_text_in_logprobs", "return_prompt_token_ids",
    "return_hidden_states", "session_params", "session_id", "lora_path", "custom_logit_processor", "priority",
    "extra_key", "cache_salt", "routed_dp_rank", "custom_labels", "image_data", "log_metrics", "other",
)  # fmt: skip
nasty = st.sampled_from(NASTY)
params = st.dictionaries(st.sampled_from(SAMPLING), nasty, max_size=4)
prompts = st.sampled_from([{"text": "ab"}, {"text": ["ab", "c"]}, {"input_ids": [5, 6]}, {"input_ids": [[5], [6, 7]]}])
fields = st.dictionaries(st.sampled_from(FIELDS), nasty, max_size=3)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(prompts, params, fields, st.booleans(), st.booleans())
def test_every_body_gets_an_answer(
    tiny_api: Api, prompt: Any, sampling: Any, more: Any, stream: bool, logprobs: bool
) -> None:
    body = {**prompt, "return_logprob": logprobs, "top_logprobs_num": 2, "stream": stream}
    body |= {"sampling_params": {"max_new_tokens": 3, **sampling}, **more}
    answer = tiny_api.post(body)
    assert answer.status_code in (200, 400), (body, answer.text)
    if answer.status_code == 400:
        error = answer.json()
        assert error.keys() == {"error"} or error["object"] == "error"
    elif stream:
        for chunk in parse_events(answer.text):
            finish = {} if "error" in chunk else chunk["meta_info"]["finish_reason"] or {}
            assert finish.get("status_code") in (None, 400), (body, chunk)
            assert finish.get("matched") != "NaN happened", body
    else:
        parsed = json.loads(answer.text, parse_constant=lambda word: 1 / 0)
        for one in parsed if isinstance(parsed, list) else [parsed]:
            assert one["meta_info"]["finish_reason"].get("matched") != "NaN happened", body


def test_the_server_is_well_afterwards(tiny_api: Api) -> None:
    tiny_api.wait_idle()
    assert tiny_api.http.get("/health_generate").status_code == 200
