"""Splitting a /generate call into items: batches, samples, rids, seeds, merging, and what the frontend refuses."""

from __future__ import annotations

import itertools
import json
import random
from array import array
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import ConfigError, ModelFacts, ModelSource, RunConfig, ServerConfig
from engine.config.run import PooledFacts
from http_frontend.defaults import read_preferred, sample_seed
from http_frontend.errors import RefusedError
from http_frontend.generate import read_generate
from http_frontend.items import Desk, Plan, plan_call

INT64 = 2**63


def desk(running: set[str] = frozenset(), is_generation: bool = True, **server: Any) -> Desk:  # type: ignore[assignment]
    config = ServerConfig(**server)
    source = ModelSource(name="m", kind="folder", path="/m")
    facts = ModelFacts(
        architectures=[],
        model_type=None,
        vocab_size=1000,
        context_length=99,
        eos_ids=[],
        pooled=None if is_generation else PooledFacts(kind="embedding", width=8),
    )
    run = RunConfig(
        server=config,
        model=source,
        tokenizer=source,
        facts=facts,
        runtime_dir="/r",
        launcher_pid=1,
        launch_command="",
        started_at=0.0,
    )
    return Desk(run, read_preferred(config), itertools.count(1).__next__, random.Random(7), lambda rid: rid in running)


def plan(fields: dict[str, Any], at: Desk | None = None) -> Plan:
    return plan_call(read_generate(json.dumps(fields).encode(), "application/json"), at or desk())


def refusal(fields: dict[str, Any], at: Desk | None = None) -> tuple[str, int, str]:
    with pytest.raises(RefusedError) as caught:
        plan(fields, at)
    return caught.value.shape, caught.value.status, caught.value.message


EITHER = "Either text, input_ids or input_embeds should be provided."


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, EITHER),
        ({"text": None, "input_ids": None}, EITHER),
        ({"text": "a", "input_ids": [1], "input_embeds": [[0.5]]}, EITHER),
        ({"input_ids": []}, "input_ids cannot be empty."),
        ({"input_ids": [[1], []]}, "input_ids cannot be empty."),
        (
            {"input_ids": [1, 2**40]},
            f"input_ids contains out-of-vocabulary token id {2**40}; valid range is [0, 1000).",
        ),
        (
            {"input_embeds": [[0.5]]},
            "input_embeds is provided while disable_radix_cache is False. Please add `--disable-radix-cache` when you "
            "launch the server if you want to use input_embeds as inputs.",
        ),
        (
            {"text": ["a", "b"], "rid": ["x", "x"]},
            "Duplicate request IDs detected within the request: ['x']",
        ),
        (
            {"text": ["a", "b"], "rid": ["x"]},
            "The specified rids length mismatch with the batch_size for batch processing.",
        ),
        (
            {"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]},
            "The parallel_sample_num should be the same for all samples in sample params.",
        ),
        (
            {"text": ["a"], "return_logprob": [True], "sampling_params": {"n": 2}},
            "Cannot use list return_logprob with parallel_sample_num > 1",
        ),
        (
            {"text": "a", "return_logprob": True, "token_ids_logprob": [[1]], "sampling_params": {"n": 2}},
            "Cannot use list token_ids_logprob with parallel_sample_num > 1",
        ),
        (
            {"text": ["a", "b"], "sampling_params": [{}]},
            "sampling_params has 1 entries, but the batch size is 2.",
        ),
        ({"text": "a", "top_logprobs_num": []}, "top_logprobs_num has 0 entries, but the batch size is 1."),
        ({"text": "a", "sampling_params": {"n": None}}, "n must be at least 1, got null."),
        ({"text": "a", "sampling_params": {"n": 0}}, "n must be at least 1, got 0."),
        ({"text": "a", "token_ids_logprob": [[1]]}, "token_ids_logprob must be a flat list of integers."),
        ({"text": "a", "token_ids_logprob": [1, [2]]}, "token_ids_logprob must be a flat list of integers."),
        (
            {"text": "a", "lora_path": "ad"},
            "LoRA adapter 'ad' was requested, but LoRA is not enabled. Please launch the server with --enable-lora "
            "flag and preload adapters using --lora-paths or /load_lora_adapter endpoint.",
        ),
        (
            {"text": "a", "return_hidden_states": True},
            "The server is not configured to return hidden states. Please set `--return-hidden-states-mode last`, "
            "`--return-hidden-states-mode full`, or the legacy `--enable-return-hidden-states` flag.",
        ),
        (
            {"text": "a", "custom_logit_processor": "x"},
            "The server is not configured to enable custom logit processor. Please set "
            "`--enable-custom-logit-processor` to enable this feature.",
        ),
        (
            {"text": "a", "priority": INT64},
            "priority must be a signed 64-bit integer between -9223372036854775808 and 9223372036854775807",
        ),
        (
            {"text": "a", "session_id": "s", "session_params": {"id": "s"}},
            "session_id and session_params cannot both be set.",
        ),
        (
            {"text": "a", "sampling_params": {"regex": "a", "ebnf": "b"}},
            "Only one of json_schema, regex, ebnf, or structural_tag can be set.",
        ),
        ({"text": "a", "sampling_params": {"beam_width": 0}}, "beam_width must be at least 1, got 0."),
        (
            {"text": "a", "sampling_params": {"sampling_seed": INT64}},
            f"sampling_seed must be in [-2**63, 2**63 - 1], got {INT64}.",
        ),
    ],
)
def test_exact_refusals(fields: dict[str, Any], message: str) -> None:
    assert refusal(fields) == ("A", 400, message)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"text": "a", "session_params": {"id": "s"}}, "not supported yet"),
        ({"text": "a", "image_data": ["x"]}, "image_data"),
        ({"text": "a", "sampling_params": {"beam_width": 2}}, "beam_width"),
        ({"text": "a", "sampling_params": {"watermark": True}}, "watermark"),
        ({"text": "a", "sampling_params": {"choice": None}}, "choice"),
        ({"text": "a", "routed_dp_rank": 1}, "routed_dp_rank"),
        ({"text": "a", "sampling_params": {"n": 10**12}}, "at most"),
        ({"input_ids": [1, [2]]}, "not a mixture"),
        ({"text": "a", "return_routed_experts": True}, "return_routed_experts"),
    ],
)
def test_unsupported_features_are_refused_by_name(fields: dict[str, Any], part: str) -> None:
    shape, status, message = refusal(fields)
    assert (shape, status) == ("A", 400)
    assert part in message


def test_refusals_that_depend_on_the_server() -> None:
    assert refusal({"input_ids": [INT64]})[0] == "C"
    assert "embedding model" in refusal({"text": "a"}, desk(is_generation=False))[2]
    assert "not supported yet" in refusal({"input_embeds": [[1.0]]}, desk(disable_radix_cache=True))[2]
    assert refusal({"text": "a", "rid": "x"}, desk({"x"}))[2] == "Duplicate request ID detected: x"
    assert refusal({"text": ["a", "b"], "rid": "x"}, desk({"x_1"}))[2] == "Duplicate request ID detected: x_1"
    assert refusal({"text": "a", "priority": 1}, desk(abort_on_priority_when_disabled=True)) == (
        "D",
        503,
        "Using priority is disabled for this server. Please send a new request without a priority.",
    )


def test_single_and_batch() -> None:
    one = plan({"text": "a", "rid": "x"})
    assert (one.many, len(one.items), one.items[0].generate.rid) == (False, 1, "x")
    listed = plan({"text": ["a"], "rid": "x"})
    assert (listed.many, [item.generate.rid for item in listed.items]) == (True, ["x_0"])
    ids = plan({"input_ids": [[1, 2], [3]], "rid": ["p", "q"], "sampling_params": [{"top_k": 3}, {}]})
    assert [item.generate.input_ids for item in ids.items] == [array("i", [1, 2]).tobytes(), array("i", [3]).tobytes()]
    assert [item.generate.sampling.top_k for item in ids.items] == [3, -1]
    assert plan({"text": []}) == Plan([], [], 1, True)


def test_parallel_samples_are_prompt_major_behind_one_warmer_a_prompt() -> None:
    made = plan({"text": ["a", "b"], "rid": "x", "sampling_params": {"n": 3, "sampling_seed": 5}})
    assert [item.generate.text for item in made.items] == ["a", "a", "a", "b", "b", "b"]
    assert [item.asked_rid for item in made.items] == ["x_0"] * 3 + ["x_1"] * 3
    assert [item.generate.sampling.seed for item in made.items[:3]] == [5, sample_seed(5, 1), sample_seed(5, 2)]
    assert [(w.text, w.sampling.max_new_tokens, w.logprobs) for w in made.warmers] == [("a", 0, None), ("b", 0, None)]
    every = [*(item.generate for item in made.items), *made.warmers]
    assert len({one.rid for one in every}) == len({one.key for one in every}) == 8
    assert not {one.rid for one in every} & {"x", "x_0", "x_1"}


@given(st.integers(-INT64, INT64 - 1))
def test_sample_seeds_are_signed_64_bit_and_distinct(seed: int) -> None:
    seeds = [sample_seed(seed, k) for k in range(50)]
    assert seeds[0] == seed
    assert len(set(seeds)) == 50
    assert all(-INT64 <= one < INT64 for one in seeds)
    assert seeds == [sample_seed(seed, k) for k in range(50)]


def test_seeds_are_drawn_when_none_is_given() -> None:
    drawn = [item.generate.sampling.seed for item in plan({"text": ["a"] * 40}).items]
    assert len(set(drawn)) == 40
    assert min(drawn) < 0 < max(drawn)
    assert drawn == [item.generate.sampling.seed for item in plan({"text": ["a"] * 40}).items], "--random-seed"


def test_request_over_preferred_over_built_in() -> None:
    at = desk(preferred_sampling_params={"temperature": 0.5, "top_k": 7, "max_new_tokens": 9, "stop": "x"})
    sampling = (
        plan({"text": "a", "sampling_params": {"temperature": None, "top_p": 0.5}}, at).items[0].generate.sampling
    )
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_new_tokens) == (1.0, 7, 0.5, 9)
    assert not sampling.length_given
    given_null = plan({"text": "a", "sampling_params": {"max_new_tokens": None}}, at).items[0].generate
    assert given_null.sampling.max_new_tokens is None
    assert given_null.text_options.stop == ["x"]
    own = plan({"text": "a", "sampling_params": {"max_new_tokens": 3}}, at).items[0].generate.sampling
    assert (own.max_new_tokens, own.length_given) == (3, True)
    assert plan({"text": "a"}).items[0].generate.sampling.max_new_tokens == 128


def test_wrong_preferred_parameters_are_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="--preferred-sampling-params"):
        desk(preferred_sampling_params={"temperatur": 1})


def test_logprob_options_per_item() -> None:
    made = plan(
        {
            "text": ["a", "b"],
            "return_logprob": [True, False],
            "logprob_start_len": [3, 4],
            "top_logprobs_num": 2,
            "token_ids_logprob": [5, 6],
        }
    )
    first, second = (item.generate.logprobs for item in made.items)
    assert first is not None
    assert msgspec.structs.astuple(first) == (3, 2, [5, 6])
    assert second is None


def test_cache_keys_are_equal_only_when_both_parts_are() -> None:
    pairs = [("a", None), (None, "a"), ("a", "b"), ("ab", None), ("", "ab"), ("a,b", None)]
    keys = [plan({"text": "t", "extra_key": e, "cache_salt": s}).items[0].generate.extra_key for e, s in pairs]
    assert len(set(keys)) == len(pairs)
    assert plan({"text": "t", "extra_key": "", "cache_salt": None}).items[0].generate.extra_key is None


def test_priorities() -> None:
    at = desk(enable_priority_scheduling=True, default_priority_value=4)
    assert [plan({"text": "a", **f}, at).items[0].generate.priority for f in ({}, {"priority": 9})] == [4, 9]
    assert plan({"text": "a", "priority": 9}).items[0].generate.priority is None


def test_stream_interval_and_stops() -> None:
    at = desk(stream_interval=5)
    intervals = [
        plan({"text": "a", "sampling_params": p}, at).items[0].stream_interval for p in ({}, {"stream_interval": 0})
    ]
    assert intervals == [5, 1]
    options = (
        plan({"text": "a", "sampling_params": {"stop": ["", "x"], "stop_regex": "y"}}).items[0].generate.text_options
    )
    assert (options.stop, options.stop_regex) == (["x"], ["y"])


def test_a_large_batch_of_equal_rids_is_refused_in_one_pass() -> None:
    """Comparing each with all before it would hold up every other client for minutes."""
    rids = [str(i) for i in range(30_000)] * 2
    shape, status, message = refusal({"text": ["a"] * len(rids), "rid": rids})
    assert (shape, status) == ("A", 400)
    assert message.startswith("Duplicate request IDs detected within the request: ['0', '1', '2', ")


def test_media_nested_as_deep_as_json_may_be() -> None:
    def media(depth: int, inner: str) -> bytes:
        return b'{"text": "a", "image_data": %b%b%b}' % (b"[" * depth, inner.encode(), b"]" * depth)

    decode = msgspec.json.Decoder(Any)
    depth = 100
    while True:  # as deep as the decoder goes
        try:
            decode.decode(b"[" * (depth + 50) + b"]" * (depth + 50))
        except RecursionError:
            break
        depth += 50
        if depth >= 20_000:
            break
    depth -= 100
    assert plan_call(read_generate(media(depth, "null"), "application/json"), desk()).items
    with pytest.raises(RefusedError, match="image_data must be null"):
        plan_call(read_generate(media(depth, '"x"'), "application/json"), desk())
