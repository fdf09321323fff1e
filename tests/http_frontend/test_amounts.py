"""Calls whose items repeat what their body says once, or ask for far more than it: refused before any copy is made."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from fake_ring import Live, call, live_frontend
from test_items import desk, plan, refusal

PROMPTS = ["a"] * 1000
LONG = "x" * 100_000
FEW: dict[str, Any] = {"max_new_tokens": 1}
REPEATED: dict[str, dict[str, Any]] = {
    "extra_key": {"extra_key": LONG},
    "cache_salt": {"cache_salt": LONG},
    "stop": {"sampling_params": FEW | {"stop": [LONG]}},
    "stop_regex": {"sampling_params": FEW | {"stop_regex": LONG}},
    "stop_token_ids": {"sampling_params": FEW | {"stop_token_ids": [5] * 10_000}},
    "logit_bias": {"sampling_params": FEW | {"logit_bias": {str(i): 1 for i in range(5000)}}},
    **{name: {"sampling_params": FEW | {name: LONG}} for name in ("json_schema", "regex", "ebnf", "structural_tag")},
    "token_ids_logprob": {"return_logprob": True, "token_ids_logprob": [5] * 10_000},
}


@pytest.mark.parametrize("field", REPEATED)
@pytest.mark.parametrize("samples", [False, True])
def test_what_every_item_repeats(field: str, samples: bool) -> None:
    fields = {"text": PROMPTS, "sampling_params": FEW} | REPEATED[field]
    if samples:
        fields |= {"text": "a", "sampling_params": fields["sampling_params"] | {"n": len(PROMPTS)}}
    tracemalloc.start()
    try:
        shape, status, message = refusal(fields)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert (shape, status) == ("A", 400)
    assert message.startswith(f"{field} of length ") and "once for each of 1000 items, exceeds 67108864" in message
    # A single item may have it, and each item something of its own.
    assert len(plan(fields | {"text": "a", "sampling_params": REPEATED[field].get("sampling_params", FEW)}).items) == 1


def test_items_of_a_call() -> None:
    most = 65_536
    assert len(plan({"text": "a", "sampling_params": {"n": most}}).items) == most
    for prompts, n in ((1, most + 1), (2, most // 2 + 1), (most + 1, 1)):
        said = refusal({"text": ["a"] * prompts, "sampling_params": {"n": n}})[2]
        assert said == f"a call may have at most {most} items, got {prompts} prompts times n={n}."


def test_fields_of_their_own() -> None:
    keys = [f"{i}{LONG}" for i in range(20)]
    made = plan({"text": ["a"] * 20, "extra_key": keys, "token_ids_logprob": [[1]] * 20, "return_logprob": True})
    assert len({item.generate.extra_key for item in made.items}) == 20


def test_ids_of_requests_are_short() -> None:
    assert plan({"text": "a", "rid": "r" * 1024}).items
    for rid in ("r" * 1025, ["r" * 1025]):
        given: dict[str, Any] = {"text": "a" if isinstance(rid, str) else ["a"], "rid": rid}
        assert refusal(given) == ("A", 400, "rid may have at most 1024 characters, got 1025.")
    assert refusal({"text": PROMPTS, "rid": LONG})[2] == "rid may have at most 1024 characters, got 100000."


@pytest.mark.parametrize("samples", [False, True])
def test_logprobs_of_a_whole_call(samples: bool) -> None:
    """A context of 99 tokens, a vocabulary of 1000: 60,000 answers of 99 * 1000 entries, or of 2."""
    size = 60_000
    many: dict[str, Any] = {"text": "aaaa", "sampling_params": {"n": size}} if samples else {"text": ["aaaa"] * size}
    wanted = many | {"return_logprob": True, "top_logprobs_num": 10**9}
    assert refusal(wanted)[2] == (
        f"the items of the call ask for {size * 99 * 1000} logprob entries; at most 16000000 are allowed."
    )
    few = {"max_new_tokens": 1, "n": size} if samples else {"max_new_tokens": 1}
    assert len(plan(many | {"sampling_params": few, "return_logprob": True, "top_logprobs_num": 2}).items) == size
    told = wanted | {"sampling_params": few, "top_logprobs_num": 60, "logprob_start_len": 0}
    assert f"ask for {size * 5 * 60} logprob entries" in refusal(told)[2]
    # One item is the tokenizer's to judge, which knows its prompt.
    assert plan({"text": "a", "return_logprob": True, "top_logprobs_num": 10**9}, desk()).items


def test_prompts_of_many_samples_count_for_the_queue() -> None:
    """Even on an idle server: a single prompt may be of any length, but not a thousand times."""
    with live_frontend(max_queued_tokens=10_000, context_length=10) as live:
        one = call("x" * 60_000)
        assert live.client.post("/generate", json=one).status_code == 200
        one["sampling_params"]["n"] = 1000
        refused = live.client.post("/generate", json=one)
        assert (refused.status_code, refused.json()["message"]) == (503, "The request queue is full.")


def test_texts_that_everybody_would_wait_for(live: Live) -> None:
    for path, body, said in (
        ("/tokenize", {"prompt": "x" * (1 << 18) + "y"}, "a text has 262145 characters; at most 262144"),
        ("/tokenize", {"prompt": ["x" * (1 << 18)] * 17}, "4456448 characters in all; at most 4194304"),
        ("/tokenize", {"prompt": ["x"] * 65537}, "prompt may have at most 65536 entries, got 65537."),
        ("/detokenize", {"tokens": [5] * ((1 << 22) + 1)}, "4194305 ids in all; at most 4194304"),
        ("/detokenize", {"tokens": [[5]] * 65537}, "tokens may have at most 65536 entries, got 65537."),
    ):
        refused = live.client.post(path, json=body)
        assert refused.status_code == 400 and said in refused.text
    assert live.client.post("/tokenize", json={"prompt": "x" * 200_000}).status_code == 200
