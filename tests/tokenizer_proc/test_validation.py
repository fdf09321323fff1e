"""The contract's ranges and messages (§2.3, §5.3, §6.1), case by case."""

from __future__ import annotations

import json
from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.wire.sampling import Grammar, LogprobOptions, Sampling, TextOptions
from engine.wire.to_frontend import Ended
from engine.wire.to_tokenizer import Generate
from tokenizer_proc.admission import admit
from tokenizer_proc.stop_patterns import MAX_PATTERN_SIZE, pattern_error
from tokenizer_proc.validation import (
    Bounds,
    RefusalError,
    cap_lengths,
    check_grammar,
    check_ids,
    check_logprobs,
    check_sampling,
    check_stops,
    fit_context,
)

V, C = 100, 50
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1."),
        ({"min_new_tokens": -2}, "min_new_tokens must be in [0, max_new_tokens], got -2."),
        ({"min_new_tokens": 129}, "min_new_tokens must be in [0, max_new_tokens(128)], got 129."),
        ({"temperature": -0.5}, "temperature must be a non-negative finite number, got -0.5."),
        ({"temperature": NAN}, "temperature must be a non-negative finite number, got nan."),
        ({"temperature": INF}, "temperature must be a non-negative finite number, got inf."),
        ({"top_p": 0.0}, "top_p must be in (0, 1], got 0.0."),
        ({"top_p": 1e300}, "top_p must be in (0, 1], got 1e+300."),
        ({"top_p": NAN}, "top_p must be in (0, 1], got nan."),
        ({"top_k": 0}, "top_k must be -1 (disable) or at least 1, got 0."),
        ({"top_k": -2}, "top_k must be -1 (disable) or at least 1, got -2."),
        ({"min_p": 1.5}, "min_p must be in [0, 1], got 1.5."),
        ({"frequency_penalty": 2.5}, "frequency_penalty must be in [-2, 2], got 2.5."),
        ({"presence_penalty": -3.0}, "presence_penalty must be in [-2, 2], got -3.0."),
        (
            {"repetition_penalty": 0.0},
            "repetition_penalty must be in (0, 2] (1.0 = no penalty), got 0.0.",
        ),
        ({"logit_bias": {"100": 1.0}}, "logit_bias must has keys in [0, 99], got 100."),
        ({"logit_bias": {"1": 1.0, "-1": 1.0}}, "logit_bias must has keys in [0, 99], got -1."),
        ({"logit_bias": {"١": 1.0}}, "logit_bias must has keys in [0, 99], got ١."),
        ({"logit_bias": {"a": 1.0}}, "logit_bias must has keys in [0, 99], got a."),
        ({"logit_bias": {"": 1.0}}, "logit_bias must has keys in [0, 99], got ."),
        ({"logit_bias": {"9" * 5000: 1.0}}, f"logit_bias must has keys in [0, 99], got {'9' * 5000}."),
        ({"logit_bias": {"5": INF}}, "logit_bias must have finite values, got inf for 5."),
    ],
)
def test_sampling_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusalError) as caught:
        check_sampling(Sampling(**fields), V)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_new_tokens": None, "min_new_tokens": 10**6},
        {"max_new_tokens": 0},
        {"temperature": 0.0, "top_p": 1.0, "top_k": 1, "min_p": 1.0},
        {"frequency_penalty": -2.0, "presence_penalty": 2.0, "repetition_penalty": 2.0, "top_k": 10**12},
        {"logit_bias": {"0": -100.0, "99": 100.0, "007": 1.0}},
    ],
)
def test_sampling_in_range(fields: dict[str, Any]) -> None:
    check_sampling(Sampling(**fields), V)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TextOptions(stop=["x"] * 33), "at most 32 stop strings are allowed, got 33"),
        (TextOptions(stop_regex=["x"] * 33), "at most 32 stop_regex patterns are allowed, got 33"),
        (TextOptions(stop_regex=["é" * 129]), "stop_regex is 258 bytes, over the 256-byte limit"),
        (
            TextOptions(stop_regex=["a", "("]),
            "invalid stop_regex '(': missing ), unterminated subpattern at position 0",
        ),
    ],
)
def test_stops_out_of_range(options: TextOptions, message: str) -> None:
    with pytest.raises(RefusalError) as caught:
        check_stops(options, Sampling(), has_tokenizer=True)
    assert str(caught.value) == message


def test_stops_need_a_tokenizer() -> None:
    for options, sampling, field in (
        (TextOptions(stop=["x"]), Sampling(), "stop=['x']"),
        (TextOptions(stop_regex=["x"]), Sampling(), "stop_regex=['x']"),
        (TextOptions(), Sampling(min_new_tokens=1), "min_new_tokens=1"),
    ):
        check_stops(options, sampling, has_tokenizer=True)
        with pytest.raises(RefusalError, match="is unavailable when skip_tokenizer_init=True") as caught:
            check_stops(options, sampling, has_tokenizer=False)
        assert str(caught.value).startswith(field)


@pytest.mark.parametrize(
    "pattern",
    [
        "((a{1000}){1000}){1000}",
        "a{1000000000}",
        "(a{10}b){100000}",
        "((((((a?){9}){9}){9}){9}){9}){9}",
        "(?:(?=a){999}){99}",
    ],
)
def test_patterns_that_would_take_all_memory_are_refused(pattern: str) -> None:
    assert f"at most {MAX_PATTERN_SIZE} are allowed" in str(pattern_error(pattern))


@pytest.mark.parametrize("pattern", ["*", "[", "(?P<n", "\\", "(" * 128 + ")" * 127, "(?V1)x", "a**"])
def test_invalid_patterns_are_refused(pattern: str) -> None:
    assert pattern_error(pattern)


@pytest.mark.parametrize(
    "pattern",
    [r"\d{4}-\d{2}-\d{2}", "(?i)end of (story|text)", "a{1,1000}", "(" * 60 + ")" * 60, "", "[[a]", "x{e<=1}"],
)
def test_usual_patterns_are_fine(pattern: str) -> None:
    assert pattern_error(pattern) is None


@given(st.text("ab(){}[]|*+?\\^$.,0123456789:=!<P>-", max_size=40))
@settings(max_examples=500, deadline=None)
def test_no_pattern_makes_the_check_fail(pattern: str) -> None:
    assert pattern_error(pattern) is None or isinstance(pattern_error(pattern), str)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "input_ids cannot be empty."),
        ([1, -1, 200], "input_ids contains out-of-vocabulary token id -1; valid range is [0, 100)."),
        ([99, 100], "input_ids contains out-of-vocabulary token id 100; valid range is [0, 100)."),
    ],
)
def test_ids(ids: list[int], message: str) -> None:
    with pytest.raises(RefusalError) as caught:
        check_ids(array("i", ids), V)
    assert str(caught.value) == message
    check_ids(array("i", [0, 99]), V)


@pytest.mark.parametrize(
    ("options", "message", "origin"),
    [
        (LogprobOptions(start=-2), "logprob_start_len must be in [-1, 7], got -2.", "door"),
        (LogprobOptions(top=-1), "top_logprobs_num must be in [0, 100], got -1.", "door"),
        (LogprobOptions(top=10**6), "top_logprobs_num must be in [0, 100], got 1000000.", "door"),
        (
            LogprobOptions(ids=[1, 100]),
            "token_ids_logprob contains out-of-vocabulary token id 100; valid range is [0, 100).",
            "door",
        ),
        (
            LogprobOptions(start=8),
            "req.logprob_start_len=8 is higher than the number of input tokens len(req.origin_input_ids)=7. "
            "Please use a smaller logprob_start_len.",
            "scheduler",
        ),
    ],
)
def test_logprobs(options: LogprobOptions, message: str, origin: str) -> None:
    with pytest.raises(RefusalError) as caught:
        check_logprobs(options, 7, 3, V)
    assert (str(caught.value), caught.value.origin) == (message, origin)
    check_logprobs(LogprobOptions(start=7, top=100, ids=[0, 99]), 7, 3, V)


def test_logprobs_must_not_come_to_more_than_memory_can_hold() -> None:
    check_logprobs(LogprobOptions(start=0, top=40_000), 50, 50, 50_000)
    with pytest.raises(RefusalError, match="over 101 positions ask for 4040000 entries; at most 4000000"):
        check_logprobs(LogprobOptions(start=0, top=40_000), 51, 50, 50_000)
    check_logprobs(LogprobOptions(start=-1, top=40_000), 8_000, 50, 50_000)


def given_length(tokens: int) -> Sampling:
    return Sampling(max_new_tokens=tokens, length_given=True)


def test_lengths_that_fit_and_that_do_not() -> None:
    bounds = Bounds(V, C)
    assert fit_context(49, Sampling(), bounds) == (49, Sampling(), [])
    assert fit_context(40, given_length(10), bounds) == (40, given_length(10), [])
    with pytest.raises(RefusalError) as caught:
        fit_context(50, given_length(100), bounds)
    assert str(caught.value) == "The input (50 tokens) is longer than the model's context length (50 tokens)."
    with pytest.raises(RefusalError) as caught:
        fit_context(40, given_length(11), bounds)
    assert str(caught.value) == (
        "Requested token count exceeds the model's maximum context length of 50 tokens. You requested a total of 51 "
        "tokens: 40 tokens from the input messages and 11 tokens for the completion. Please reduce the number of "
        "tokens in the input messages or the completion to fit within the limit."
    )


@given(st.integers(1, 200), st.one_of(st.none(), st.integers(0, 200)), st.booleans())
def test_truncation_makes_everything_fit(prompt_tokens: int, wanted: int | None, explicit: bool) -> None:
    sampling = Sampling(max_new_tokens=wanted, length_given=explicit)
    kept, fitted, cuts = fit_context(prompt_tokens, sampling, Bounds(V, C, auto_truncate=True))
    assert kept == min(prompt_tokens, C - 7)
    if explicit and wanted is not None:
        assert fitted.max_new_tokens == min(wanted, C - kept)
    else:
        assert fitted == sampling
    assert bool(cuts) == (kept != prompt_tokens or fitted != sampling)


def test_the_operators_limit() -> None:
    assert cap_lengths(Sampling(max_new_tokens=None, min_new_tokens=9), 5) == Sampling(
        max_new_tokens=5, min_new_tokens=5
    )
    assert cap_lengths(Sampling(max_new_tokens=3), 5) == Sampling(max_new_tokens=3)
    assert cap_lengths(Sampling(max_new_tokens=300), None) == Sampling(max_new_tokens=300)


@given(
    ids=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5),
    numbers=st.lists(st.floats(), min_size=6, max_size=6),
    counts=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=6, max_size=6),
    stop=st.lists(st.text(max_size=5), max_size=3),
    bias=st.dictionaries(st.text(max_size=5), st.floats(), max_size=2),
)
@settings(deadline=None)
def test_whatever_is_sent_is_answered(
    ids: list[int], numbers: list[float], counts: list[int], stop: list[str], bias: dict[str, float]
) -> None:
    sampling = Sampling(
        max_new_tokens=counts[0],
        length_given=True,
        min_new_tokens=counts[1],
        top_k=counts[2],
        temperature=numbers[0],
        top_p=numbers[1],
        min_p=numbers[2],
        frequency_penalty=numbers[3],
        presence_penalty=numbers[4],
        repetition_penalty=numbers[5],
        logit_bias=bias,
    )
    message = Generate(
        key=1,
        attempt=0,
        rid="r",
        text=None,
        input_ids=array("i", ids).tobytes(),
        output_ids=b"",
        sampling=sampling,
        text_options=TextOptions(stop=stop, stop_regex=stop),
        logprobs=LogprobOptions(start=counts[3], top=counts[4], ids=[counts[5]]),
    )
    outcome = admit(message, None, Bounds(V, C, has_tokenizer=False))
    if isinstance(outcome, Ended):
        assert outcome.finish.status == 400
        assert json.dumps(outcome.finish.message)


def test_the_size_of_a_pattern() -> None:
    assert pattern_error("a{10000}") is None
    assert pattern_error("a{10001}") == "its repetitions make 10001 elements, at most 10000 are allowed"


@pytest.mark.parametrize(
    ("grammar", "changes", "message"),
    [
        (Grammar("json", "{}"), {"grammars": False}, "Grammar-based generation (json_schema, regex, ebnf, "
         "structural_tag) is not supported when the server is launched with --grammar-backend none"),
        (Grammar("json", "{}"), {"has_tokenizer": False}, "json_schema is unavailable when skip_tokenizer_init=True "
         "(requires tokenizer to know the text of tokens)."),
        (Grammar("ebnf", "{}"), {"has_tokenizer": False}, "ebnf is unavailable when skip_tokenizer_init=True "
         "(requires tokenizer to know the text of tokens)."),
        (Grammar("json", "a\0"), {}, r"Invalid json: NUL bytes (\u0000) are not allowed"),
        (Grammar("regex", "\0"), {}, r"Invalid regex: NUL bytes (\u0000) are not allowed"),
    ],
)  # fmt: skip
def test_grammars_that_are_not_compiled(grammar: Grammar, changes: dict[str, Any], message: str) -> None:
    bounds = Bounds(vocab_size=100, context_length=64, **changes)
    with pytest.raises(RefusalError) as caught:
        check_grammar(grammar, bounds)
    assert (str(caught.value), caught.value.origin) == (message, "scheduler")
    check_grammar(None, bounds)


def test_grammars_that_are() -> None:
    check_grammar(Grammar("json", "INVALID"), Bounds(vocab_size=100, context_length=64))
