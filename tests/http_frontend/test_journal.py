"""The journal and what is written from it, with hypothesis against a plain list of tokens."""

from __future__ import annotations

import json
from array import array
from itertools import chain
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from engine.wire.results import Finish, TokenLogprobs
from engine.wire.sampling import LogprobOptions, Sampling, TextOptions
from engine.wire.to_frontend import Accepted, Begun, Ended, TextStep, Vectors
from engine.wire.to_scheduler import Abort
from engine.wire.to_tokenizer import Embed, Generate
from http_frontend.answers import AnswerStyle, Writer, failure
from http_frontend.journal import NEVER, Entry, Journal, nothing_to_do


def generate(key: int, rid: str | None = None, attempt: int = 0, **more: Any) -> Generate:
    fields: dict[str, Any] = {"text_options": TextOptions(), "logprobs": None, **more}
    return Generate(
        key=key,
        attempt=attempt,
        rid=rid or f"rid{key}",
        text="x",
        input_ids=None,
        output_ids=b"",
        sampling=Sampling(),
        **fields,
    )


def step(rows: list[tuple[int, int, str, int]], **columns: Any) -> TextStep:
    keys, attempts, texts, tokens = ([row[i] for row in rows] for i in range(4))
    empty: dict[str, Any] = {"begun": [], "finished": {}, "logprobs": {}, "logprob_texts": {}, "retracted": {}}
    return TextStep(keys=keys, attempts=attempts, texts=texts, tokens=tokens, **{**empty, **columns})


def style(**fields: Any) -> AnswerStyle:
    plain = {"with_text": True, "with_prompt": False, "incremental": False, "indexed": False, "weight_version": "w"}
    return AnswerStyle(**{**plain, **fields})


_tokens = st.lists(st.tuples(st.text(st.characters(codec="utf-8"), max_size=4), st.integers(0, 99)), max_size=12)


@given(_tokens, st.lists(st.booleans(), min_size=12, max_size=12), st.integers(0, 2))
def test_a_cumulative_stream_is_the_joined_increments(
    tokens: list[tuple[str, int]], written: list[bool], top: int
) -> None:
    """Whichever steps a slow client misses, both styles tell the same whole, and lists have the counts' lengths."""
    options = LogprobOptions(start=0, top=top, ids=[7])
    journal = Journal(lambda _message: None)
    entry = Entry(generate(1, logprobs=options, text_options=TextOptions(text_in_logprobs=True)), nothing_to_do)
    journal.submit([entry])
    cumulative, incremental = Writer(entry, style()), Writer(entry, style(incremental=True))
    chunks: list[tuple[Any, Any]] = []
    for (text, token), now in zip(tokens, written, strict=False):
        scored = TokenLogprobs(-0.5, [(-1.0, token + i) for i in range(top)] if top else None, [(-2.0, 7)])
        journal.text_step(step([(1, 0, text, token)], logprobs={0: scored}, logprob_texts={0: {token: f"<{token}>"}}))
        if now:
            chunks.append((json.loads(cumulative.write()), json.loads(incremental.write())))
    journal.text_step(step([(1, 0, "", -1)], finished={0: Finish("stop", matched="end")}))
    chunks.append((json.loads(cumulative.write()), json.loads(incremental.write())))

    whole = chunks[-1][0]
    ids = [token for _, token in tokens]
    assert whole["text"] == "".join(text for text, _ in tokens)
    assert whole["output_ids"] == ids
    assert whole["meta_info"]["output_token_logprobs"] == [[-0.5, token, f"<{token}>"] for token in ids]
    names = ["output_token_logprobs", "output_token_ids_logprobs"] + (["output_top_logprobs"] if top else [])
    for growing, _ in chunks:
        meta = growing["meta_info"]
        assert whole["text"].startswith(growing["text"])
        assert {len(meta[name]) for name in names} == {meta["completion_tokens"]}
        assert meta["output_token_logprobs_length"] == meta["completion_tokens"] == len(growing["output_ids"])
        assert ("output_top_logprobs" in meta) == bool(top)
    deltas = [delta for _, delta in chunks]
    assert "".join(delta["text"] for delta in deltas) == whole["text"]
    assert list(chain.from_iterable(delta["output_ids"] for delta in deltas)) == ids
    for name in names:
        assert list(chain.from_iterable(delta["meta_info"][name] for delta in deltas)) == whole["meta_info"][name]
    assert [delta["meta_info"]["completion_tokens"] for delta in deltas] == [
        growing["meta_info"]["completion_tokens"] for growing, _ in chunks
    ]
    assert [("e2e_latency" in growing["meta_info"]) for growing, _ in chunks] == [False] * (len(chunks) - 1) + [True]
    assert "response_sent_to_client_ts" in chunks[0][0]["meta_info"]


_row = st.tuples(st.integers(0, 5), st.integers(0, 2), st.sampled_from(["", "a"]), st.integers(-1, 3), st.booleans())


@given(st.lists(st.lists(_row, max_size=6, unique_by=lambda row: row[0]), max_size=8))
def test_stale_attempts_and_unknown_keys_change_nothing(steps: list[list[tuple[int, int, str, int, bool]]]) -> None:
    """Four requests are in flight at attempt 1; a naive model takes only their rows, and only until their end."""
    journal = Journal(lambda _message: None)
    entries = [Entry(generate(key, attempt=1), nothing_to_do) for key in range(4)]
    journal.submit(entries)
    naive: dict[int, list[int]] = {key: [] for key in range(4)}
    alive = set(naive)
    for rows in steps:
        finished = {i: Finish("stop", matched=2) for i, row in enumerate(rows) if row[4]}
        journal.text_step(step([row[:4] for row in rows], finished=finished))
        for key, attempt, _, token, ends in rows:
            if key in alive and attempt == 1:
                naive[key] += [token] if token >= 0 else []
                alive -= {key} if ends else set()
    assert [entry.output_ids for entry in entries] == [naive[key] for key in range(4)]
    assert {entry.key for entry in entries if entry.finish is None} == alive
    assert len(journal) == len(alive)
    assert all(journal.is_running(f"rid{key}") == (key in alive) for key in range(4))


def test_notices_come_when_due_and_at_the_end() -> None:
    journal = Journal(lambda _message: None)
    told: list[tuple[int, int]] = []
    eager = Entry(generate(1), lambda entry: told.append((1, len(entry.output_ids))), due=2)
    patient = Entry(generate(2), lambda entry: told.append((2, len(entry.output_ids))), due=NEVER)
    journal.submit([eager, patient])
    for _ in range(2):
        journal.text_step(step([(1, 0, "a", 5), (2, 0, "a", 5)]))
    journal.text_step(step([(1, 0, "", -1), (2, 0, "", -1)], finished={1: Finish("length", length=2)}))
    assert told == [(1, 2), (1, 2), (2, 2)]


def test_followers_wait_for_the_request_that_computes_their_prompt() -> None:
    sent: list[Any] = []
    journal = Journal(sent.append)
    followers = [Entry(generate(key), nothing_to_do) for key in (2, 3)]
    warmer = Entry(generate(1), nothing_to_do)
    warmer.followers = followers
    journal.enter(followers)
    journal.submit([warmer])
    assert [message.key for message in sent] == [1]
    journal.abort([followers[0]])
    assert followers[0].finish == Finish("abort", message="Abort in waiting queue")
    journal.text_step(step([(1, 0, "", -1)], finished={0: Finish("length", length=0)}))
    assert [message.key for message in sent] == [1, 3]


def test_followers_share_the_refusal_of_their_prompt() -> None:
    journal = Journal(lambda _message: None)
    follower, warmer = Entry(generate(2), nothing_to_do), Entry(generate(1), nothing_to_do)
    warmer.followers = [follower]
    journal.enter([follower])
    journal.submit([warmer])
    journal.ended(Ended(1, 0, Finish("abort", message="no", status=400), "door"))
    assert (follower.finish, follower.origin) == (warmer.finish, "door")
    assert len(journal) == 0


def test_forgetting_aborts_and_frees_the_rid_at_once() -> None:
    sent: list[Any] = []
    journal = Journal(sent.append)
    entries = [Entry(generate(key), nothing_to_do) for key in (1, 2)]
    journal.submit(entries)
    journal.text_step(step([(2, 0, "", -1)], finished={0: Finish("stop", matched=2)}))
    journal.forget(entries)
    journal.forget(entries)
    assert [message for message in sent if isinstance(message, Abort)] == [Abort([1])]
    assert (len(journal), journal.is_running("rid1")) == (0, False)


def test_matching_by_prefix_leaves_the_servers_own_requests_alone() -> None:
    journal = Journal(lambda _message: None)
    sample = Entry(generate(3, "new"), nothing_to_do, asked_rid="x_0")
    entries = [Entry(generate(1, "x_1"), nothing_to_do), Entry(generate(2, "y"), nothing_to_do), sample]
    journal.submit([*entries, Entry(generate(4, "x_probe"), nothing_to_do, probe=True)])
    assert [entry.key for entry in journal.match("x")] == [1, 3]
    assert [entry.key for entry in journal.match(None)] == [1, 2, 3]
    assert len(journal) == 3


def test_prompt_counts_and_first_attempts_cache_figures_are_kept() -> None:
    journal = Journal(lambda _message: None)
    entry = Entry(generate(1), nothing_to_do)
    journal.submit([entry])
    journal.accepted(Accepted(1, 0, array("i", [4, 5, 6]).tobytes()))
    journal.accepted(Accepted(1, 9, b""))
    journal.text_step(step([(1, 0, "a", 8)], begun=[Begun(1, 0, 3, 2, None, None)], retracted={1: 2, 77: 1}))
    meta = msgspec.json.decode(Writer(entry, style(with_prompt=True)).write())
    assert meta["prompt_token_ids"] == [4, 5, 6]
    assert (meta["meta_info"]["prompt_tokens"], meta["meta_info"]["cached_tokens"]) == (3, 2)
    assert meta["meta_info"]["num_retractions"] == 2


def test_which_ends_are_errors_of_a_plain_call() -> None:
    def ended(finish: Finish) -> Entry:
        entry = Entry(generate(1), nothing_to_do)
        entry.finish = finish
        return entry

    assert failure(ended(Finish("abort", message="Aborted"))) is None
    assert failure(ended(Finish("stop", matched=3))) is None
    bad, busy = failure(ended(Finish("abort", message="m", status=400))), failure(ended(Finish("abort", status=503)))
    assert bad is not None
    assert busy is not None
    assert (bad.shape, bad.status) == ("A", 400)
    assert (busy.shape, busy.status, busy.kind) == ("D", 503, "503")


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.booleans(), st.booleans()), max_size=8), st.data())
def test_vectors_end_their_entries_and_nothing_else(
    rows: list[tuple[int, int, bool, bool]], data: st.DataObject
) -> None:
    """Rows are (attempt, width, known, with a hidden state); each finds its own slice."""
    journal = Journal(lambda _message: None)
    told: list[Entry] = []
    embeds = [
        Embed(key=key, attempt=attempt, rid=f"r{key}", text="x", pair=None, input_ids=None)
        for key, (attempt, _, _, _) in enumerate(rows)
    ]
    entries = {embed.key: Entry(embed, told.append) for embed, row in zip(embeds, rows, strict=True) if row[2]}
    journal.submit(entries.values())
    order = data.draw(st.permutations(range(len(rows))))
    ages = {key: data.draw(st.integers(0, 3)) for key in order}
    vectors = {key: array("f", [key + i / 3 for i in range(rows[key][1])]).tobytes() for key in order}
    journal.vectors(
        Vectors(
            keys=list(order),
            attempts=[ages[key] for key in order],
            prompt_tokens=[key + 7 for key in order],
            widths=[rows[key][1] for key in order],
            entries=b"".join(vectors[key] for key in order),
            hidden={row: bytes([key]) for row, key in enumerate(order) if rows[key][3]},
            retracted=dict.fromkeys(order, 2),
            weight_version="new",
        )
    )
    current = [key for key in order if key in entries and ages[key] == rows[key][0]]
    assert [entry.key for entry in told] == current and len(journal) == len(entries) - len(current)
    for key, entry in entries.items():
        if key not in current:
            assert (entry.finish, entry.vector, entry.weight_version) == (None, b"", "")
            continue
        assert entry.finish == Finish("length", length=0)
        assert (entry.vector, entry.hidden) == (vectors[key], bytes([key]) if rows[key][3] else b"")
        assert (entry.prompt_tokens, entry.retractions, entry.weight_version) == (key + 7, 2, "new")
