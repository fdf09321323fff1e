"""Stop strings and patterns against a naive search of the whole text, however it is cut into tokens."""

from __future__ import annotations

import itertools
import re
import time

import pytest
import regex
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from detokenizer_proc.request import RequestText
from engine.wire.results import Finish
from engine.wire.sampling import TextOptions
from engine.wire.to_detokenizer import NO_TOKEN, Opened

LETTERS = st.text("ab日 ", max_size=24)
STOPS = st.lists(st.text("ab日 ", min_size=1, max_size=5), min_size=1, max_size=4)
PATTERNS = [
    "a+b", "^b", "a$", "(?<=a)b", r"\bab\b", "a{2,3}b", "a.*?日", "b(?=a)", "(a|b)日", "aba", "[ab]{4}$", "b(?!a)",
    "(?s)a.*b ", r"(a)\1b", "日*a ", "a|b日",
]  # fmt: skip


class ChunkStream:
    """A stream in which token i brings the i-th chunk."""

    def __init__(self, chunks: list[str]) -> None:
        self.table: dict[int, str] = {}
        self.plain = False
        self.chunks = chunks

    def feed(self, token: int) -> str:
        return self.chunks[token]

    def flush(self) -> str:
        return ""

    def save(self) -> object:
        return None

    def restore(self, state: object) -> None:
        assert state is None


class ChunkStreams:
    def __init__(self, chunks: list[str]) -> None:
        self.chunks = chunks

    def open(self, prompt_tail: list[int], *, whole_prompt: bool, skip_special_tokens: bool) -> ChunkStream:
        return ChunkStream(self.chunks)


def opened(output_ids: list[int] | None = None, **options: object) -> Opened:
    return Opened(
        key=1,
        attempt=0,
        prompt_tokens=1,
        cached_tokens=0,
        prompt_tail=[0],
        output_ids=output_ids or [],
        text_options=TextOptions(**options),  # type: ignore[arg-type]
        input_logprobs=None,
    )


def cut(text: str, data: st.DataObject) -> list[str]:
    marks = data.draw(st.lists(st.integers(0, len(text)), max_size=12), label="cuts")
    edges = [0, *sorted(marks), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def run(chunks: list[str], resumed: int = 0, **options: object) -> tuple[list[str], Finish | None]:
    """Feed all chunks; the texts shown row by row (those of resumed rows are not) and the end."""
    request = RequestText(opened(list(range(resumed)), **options), ChunkStreams(chunks))  # type: ignore[arg-type]
    rows = []
    for token in range(resumed, len(chunks)):
        last = token == len(chunks) - 1
        text, finish = request.advance(token, Finish("length", length=len(chunks)) if last else None)
        rows.append(text)
        if finish is not None:
            return rows, finish
    return rows, None


def first_stop(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """The naive search: the first end at which the text ends with a stop string, the longest one there."""
    for end in range(len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            stop = max(matching, key=len)
            return end - len(stop), end, stop
    return None


@given(text=LETTERS, stops=STOPS, keep=st.booleans(), data=st.data())
@settings(max_examples=1500, deadline=None)
def test_stop_strings(text: str, stops: list[str], keep: bool, data: st.DataObject) -> None:
    chunks = cut(text, data)
    rows, finish = run(chunks, stop=stops, no_stop_trim=keep)
    found = first_stop(text, stops)
    if found is None:
        assert ("".join(rows), finish) == (text, Finish("length", length=len(chunks)))
        return
    start, end, stop = found
    assert finish == Finish("stop", matched=stop)
    assert "".join(rows) == text[: end if keep else start]
    # It ends with the token that completes the stop string, not later.
    assert len("".join(chunks[: len(rows)])) >= end > len("".join(chunks[: len(rows) - 1]))


@given(text=LETTERS, stops=STOPS, data=st.data())
@settings(max_examples=500, deadline=None)
def test_no_more_is_held_back_than_may_become_a_stop(text: str, stops: list[str], data: st.DataObject) -> None:
    assume(first_stop(text, stops) is None)
    chunks = cut(text, data)
    request = RequestText(opened(stop=stops), ChunkStreams(chunks))  # type: ignore[arg-type]
    shown = arrived = ""
    for token, chunk in enumerate(chunks):
        shown += request.advance(token, None)[0]
        arrived += chunk
        longest = max(
            (n for stop in stops for n in range(1, len(stop)) if arrived.endswith(stop[:n])),
            default=0,
        )
        assert shown == arrived[: len(arrived) - longest]


@given(text=LETTERS, stops=STOPS, data=st.data())
@settings(max_examples=500, deadline=None)
def test_a_resumed_request_goes_on_as_if_never_interrupted(text: str, stops: list[str], data: st.DataObject) -> None:
    chunks = cut(text, data)
    whole, finish = run(chunks, stop=stops)
    resumed = data.draw(st.integers(0, len(whole) - 1), label="resumed")
    assert run(chunks, resumed, stop=stops) == (whole[resumed:], finish)


@given(text=LETTERS, patterns=st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3), data=st.data())
@settings(max_examples=1500, deadline=None)
def test_stop_patterns(text: str, patterns: list[str], data: st.DataObject) -> None:
    chunks = cut(text, data)
    rows, finish = run(chunks, stop_regex=patterns)
    for row in range(len(chunks)):
        arrived = "".join(chunks[: row + 1])
        matched = next((p for p in patterns if regex.search(p, arrived)), None)
        if matched is None:
            continue
        assert finish == Finish("stop", matched=matched)
        assert len(rows) == row + 1
        # Trimmed only where the pattern's own characters stand in the text.
        expected = arrived[: arrived.find(matched)] if matched in arrived else arrived
        assert "".join(rows) == expected
        return
    assert ("".join(rows), finish) == (text, Finish("length", length=len(chunks)))


def test_stop_string_comes_before_pattern_before_the_scheduler() -> None:
    eos = Finish("stop", matched=7)
    request = RequestText(opened(stop=["X"], stop_regex=["[XY]"]), ChunkStreams(["aXY"]))  # type: ignore[arg-type]
    assert request.advance(0, eos) == ("a", Finish("stop", matched="X"))
    request = RequestText(opened(stop=["Z"], stop_regex=["[XY]"]), ChunkStreams(["aXY"]))  # type: ignore[arg-type]
    assert request.advance(0, eos) == ("aXY", Finish("stop", matched="[XY]"))


@pytest.mark.parametrize(("keep", "shown"), [(False, "hel"), (True, "hello")])
def test_the_stop_token_of_the_scheduler_is_left_out(keep: bool, shown: str) -> None:
    # "l" was held back as the beginning of a stop string, and is shown at the end.
    request = RequestText(opened(stop=["lx"], no_stop_trim=keep), ChunkStreams(["hel", "lo"]))  # type: ignore[arg-type]
    first, _ = request.advance(0, None)
    last, finish = request.advance(1, Finish("stop", matched=1))
    assert first == "he"
    assert (first + last, finish) == (shown, Finish("stop", matched=1))


def test_an_abort_shows_what_was_held_back() -> None:
    request = RequestText(opened(stop=["abc"]), ChunkStreams(["xab"]))  # type: ignore[arg-type]
    aborted = Finish("abort", message="Aborted")
    assert request.advance(0, None) == ("x", None)
    assert request.advance(NO_TOKEN, aborted) == ("ab", aborted)


def test_a_pattern_that_takes_too_long_ends_its_request() -> None:
    evil = "(?=a*a*a*a*a*a*b)"
    request = RequestText(opened(stop_regex=[evil]), ChunkStreams(["a" * 5000]))  # type: ignore[arg-type]
    text, finish = request.advance(0, None)
    assert text == "a" * 5000
    assert finish is not None and (finish.kind, finish.status) == ("abort", 400)
    assert finish.message is not None and re.escape(evil) in re.escape(finish.message)


def advance(
    patterns: list[str], seconds: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, Finish | None]:
    """Tokens one after another, at each look at the clock so many seconds later; how many came, and the end."""
    request = RequestText(opened(stop_regex=patterns), ChunkStreams(["x"] * most))  # type: ignore[arg-type]
    clock = itertools.count()
    monkeypatch.setattr(time, "process_time", lambda: next(clock) * seconds)
    for token in range(most):
        _, finish = request.advance(token, None)
        if finish is not None:
            return token + 1, finish
    return most, None


def test_a_pattern_that_takes_a_little_too_long_again_and_again_ends_its_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens, finish = advance(["never"], 0.01, 1000, monkeypatch)  # 30 ms a token
    assert finish is not None and (finish.kind, finish.status) == ("abort", 400)
    assert tokens == 18
    assert finish.message == (
        "stop_regex 'never' was given up: searching the texts of 18 tokens for all patterns took over 518 ms"
    )
    # Patterns share the budget: 15 ms a token for each of two.
    tokens, finish = advance(["never", "nor this"], 0.005, 1000, monkeypatch)
    assert finish is not None and tokens == 18


def test_a_long_answer_may_be_searched_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    assert advance(["never"], 0.0003, 5000, monkeypatch) == (5000, None)


def test_time_in_which_the_process_did_not_run_is_not_held_against_a_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container over its CPU quota stands still for longer than a search may take."""
    patterns = ["(a|b)+c.*d", "(b|a)+c.*d"]
    request = RequestText(opened(stop_regex=patterns), ChunkStreams(["ab" * 500]))  # type: ignore[arg-type]
    clock = itertools.count(step=60)
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: float(next(clock)))
        advanced = request.advance(0, None)
    assert advanced == ("ab" * 500, None)
