"""Deaths of other processes, as the frontend sees them: what it sends again, and what its clients notice."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from fake_messages import text_of
from fake_ring import LIMITS, Live, call, events, expected, live_frontend

from engine.config import read_run_config
from engine.config.run import PooledFacts, Standing
from engine.wire.lifecycle import GiveUp, Lost, Serving, Warm
from engine.wire.operation import SlowDown, Tune
from engine.wire.to_scheduler import FlushCache, QueryState, StartOver
from engine.wire.to_tokenizer import Embed, Generate, Tokenize
from engine.wire.weights import ContinueGeneration, PauseGeneration, UpdateWeights

POOL = ThreadPoolExecutor(16)


@pytest.fixture
def live() -> Iterator[Live]:
    with live_frontend(step_seconds=0.005) as live:
        yield live


def begin(live: Live, path: str = "/generate", **body: Any) -> Future[httpx.Response]:
    return POOL.submit(live.client.post, path, json=body)


def made(live: Live, count: int, tokens: int) -> None:
    """Wait until `count` requests of clients have so many tokens."""

    def enough() -> bool:
        running = [one for one in live.ring.running.values() if not one.message.rid.startswith("HEALTH")]
        return sum(one.made >= tokens for one in running) >= count

    live.ring.wait_for(enough)


def ids_of(message: Generate) -> list[int]:
    ids: array[int] = array("i")
    ids.frombytes(message.output_ids)
    return ids.tolist()


@pytest.mark.parametrize("process", ["tokenizer", "scheduler", "detokenizer"])
def test_streams_go_on_at_the_next_token(live: Live, process: str) -> None:
    logprobs = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 1, "return_text_in_logprobs": True}
    plain = live.client.post("/generate", json=call("abcd", 300, **logprobs)).json()
    streamed = begin(live, **call("abc", 300, stream=True, rid="streamed"))
    scored = begin(live, **call("abcd", 300, rid="scored", **logprobs))
    made(live, 2, 10)
    for epoch in (1, 2):
        live.lose(process, epoch)
        assert [live.client.get(path).status_code for path in ("/health_generate", "/ready")] == [503] * 2
        late = begin(live, **call(f"late {epoch}", 3))
        live.ring.hold.set()
        live.replace(epoch)
        made(live, 3, 0)
        kinds = [message for message in live.ring.seen if isinstance(message, Generate | StartOver)]
        start_over = max(i for i, message in enumerate(kinds) if isinstance(message, StartOver))
        again = {message.rid: message for message in kinds[start_over + 1 :] if isinstance(message, Generate)}
        message = again["streamed"]
        assert (message.attempt, message.text, message.suspect) == (epoch, None, epoch * (process == "scheduler"))
        assert message.input_ids == array("i", map(ord, "abc")).tobytes()
        assert ids_of(message) == list(range(3, 3 + len(ids_of(message))))
        assert len(ids_of(message)) >= 10
        wanted = again["scored"].logprobs
        assert wanted is not None and (wanted.start, wanted.top) == (-1, 1)
        live.ring.hold.clear()
        assert late.result().json()["text"] == expected(f"late {epoch}", 3)[0]
        assert live.client.get("/health").status_code == 200
    text, ids = expected("abc", 300)
    chunks = events(streamed.result())
    assert (chunks[-1]["text"], chunks[-1]["output_ids"]) == (text, ids)
    assert all(text.startswith(chunk["text"]) for chunk in chunks)
    answer = scored.result().json()
    for one in (plain, answer):
        for name in ("id", "e2e_latency", "response_sent_to_client_ts"):
            del one["meta_info"][name]
    assert answer == plain
    assert len(answer["meta_info"]["output_token_logprobs"]) == 300


def test_what_nobody_has_answered_is_asked_again(live: Live) -> None:
    """In the order of asking, requests and questions alike; what has been answered is not."""
    live.client.post("/tokenize", json={"prompt": "before"}).raise_for_status()
    live.ring.silent.set()
    asked = [begin(live, "/tokenize", prompt="abc")]
    live.ring.wait_for(lambda: len(live.ring.kinds(Tokenize)) == 2)
    asked.append(begin(live, **call("x", 2)))
    live.ring.wait_for(lambda: len(live.ring.kinds(Generate)) == 2)
    asked.append(begin(live, "/detokenize", tokens=[97, 98]))
    live.lose("detokenizer", 1)
    asked.append(begin(live, "/flush_cache?timeout=2"))
    asked.append(begin(live, "/generate", **call(["u", "v"], 2, rid="many")))
    count = len(live.ring.seen)
    live.replace(1)
    answers = [one.result() for one in asked]
    assert [answer.status_code for answer in answers[:3]] == [200] * 3
    assert (answers[0].json()["tokens"], answers[2].json()["text"]) == ([97, 98, 99], "ab")
    assert [one["text"] for one in answers[4].json()] == [text_of(1) + text_of(2)] * 2
    again = [type(message) for message in live.ring.seen[count:]]
    assert again.count(Tokenize) == 1
    ring = [kind for kind in again if kind in (StartOver, Tokenize, Generate, FlushCache)]
    assert ring[:3] == [StartOver, Tokenize, Generate] and ring.count(FlushCache) == 1


def test_samples_and_vectors_are_sent_again() -> None:
    with live_frontend(step_seconds=0.005) as live:
        live.ring.hold.set()
        body = call("abc", 5)
        body["sampling_params"]["n"] = 2
        samples = begin(live, **body)
        made(live, 1, 0)  # the warmer alone
        live.lose("tokenizer", 1)
        live.ring.hold.clear()
        live.replace(1)
        assert [one["text"] for one in samples.result().json()] == [expected("abc", 5)[0]] * 2
    with live_frontend(pooled=PooledFacts(kind="embedding", width=3)) as live:
        plain = live.client.post("/encode", json={"text": "abc"}).json()["embedding"]
        live.ring.hold.set()
        vector = begin(live, "/encode", text="abc")
        made(live, 1, 0)
        live.lose("scheduler", 1)
        live.ring.hold.clear()
        live.replace(1)
        assert vector.result().json()["embedding"] == plain
        last = live.ring.embeds()[-1]
        assert isinstance(last, Embed) and (last.attempt, last.suspect, last.text) == (1, 1, "abc")


def test_the_culprit_is_told_and_the_others_go_on(live: Live) -> None:
    culprit, others = begin(live, **call("bad", 400, rid="bad")), [begin(live, **call("ok", 400)) for _ in range(3)]
    made(live, 4, 3)
    live.lose("scheduler", 1)
    live.replace(1)
    made(live, 4, 5)
    key = live.ring.by_rid("bad").key
    live.lose("scheduler", 2, suspect=key, certain=False)  # a SIGKILL, perhaps from outside
    live.replace(2)
    made(live, 4, 7)
    live.lose("scheduler", 3, suspect=key, certain=True)
    told = culprit.result()
    assert told.status_code == 500
    assert "Request bad was in flight at 3 deaths of the scheduler" in told.text
    live.replace(3)
    assert [one.result().json()["text"] for one in others] == [expected("ok", 400)[0]] * 3


def test_three_deaths_that_nobody_is_known_to_have_caused_are_too_many(live: Live) -> None:
    plain = begin(live, **call("abc", 2000))
    streamed = begin(live, **call("abc", 2000, stream=True))
    made(live, 2, 3)
    for epoch in (1, 2, 3):
        live.lose("scheduler", epoch)
        live.replace(epoch)
        if epoch < 3:
            made(live, 2, 5)
    assert plain.result().status_code == 500 and "in flight at 3 deaths" in plain.result().text
    assert events(streamed.result())[-1]["meta_info"]["finish_reason"]["status_code"] == 500


def suspicion(live: Live, rid: str) -> int:
    """What the scheduler that lives was told of it."""
    return next(one.message.suspect for one in live.ring.running.values() if one.message.rid == rid)


def test_who_has_only_waited_is_not_suspected_before_those_that_ran(live: Live) -> None:
    ran, waited = begin(live, **call("abc", 2000, rid="ran")), begin(live, **call("abcd", 900, rid="waited"))
    made(live, 2, 1)
    key = live.ring.by_rid("ran").key
    for epoch in (1, 2, 3):
        assert (suspicion(live, "ran"), suspicion(live, "waited")) == (epoch - 1, 0)
        live.lose("scheduler", epoch, computed=[key, 10**6])
        live.replace(epoch)
        made(live, 2 if epoch < 3 else 1, 1)
    assert ran.result().status_code == 500 and "Request ran was in flight at 3 deaths" in ran.result().text
    assert suspicion(live, "waited") == 1  # no trial has named who ran: it may have been this one
    live.lose("scheduler", 4, computed=[])
    live.replace(4)
    made(live, 1, 1)
    assert suspicion(live, "waited") == 2  # nobody ran
    for epoch in (5, 6, 7):  # while it loads
        live.lose("scheduler", epoch, loaded=False)
        live.replace(epoch)
    made(live, 1, 1)
    assert suspicion(live, "waited") == 2
    assert waited.result().json()["text"] == expected("abcd", 900)[0]


def test_whoever_hangs_up_or_is_aborted_meanwhile_is_not_sent_again(live: Live) -> None:
    aborted = begin(live, **call("abc", 2000, rid="aborted"))
    made(live, 1, 3)
    live.lose("detokenizer", 1)
    live.client.post("/abort_request", json={"rid": "aborted"})
    assert aborted.result().json()["meta_info"]["finish_reason"]["type"] == "abort"
    live.replace(1)
    assert live.client.post("/generate", json=call("x", 1)).status_code == 200
    assert [message.attempt for message in live.ring.kinds(Generate) if message.rid == "aborted"] == [0]


def test_a_pause_outlives_the_scheduler(live: Live) -> None:
    assert live.client.post("/pause_generation", json={"mode": "in_place"}).status_code == 200
    for epoch, (process, paused) in enumerate((("detokenizer", None), ("scheduler", True)), 1):
        live.lose(process, epoch)
        live.replace(epoch)
        live.ring.wait_for(lambda epoch=epoch: len(live.ring.kinds(StartOver)) == epoch)
        assert live.ring.kinds(StartOver)[-1].paused is paused
        live.client.post("/pause_generation", json={"mode": "in_place"})  # the fake scheduler has forgotten
    assert len(live.ring.kinds(PauseGeneration)) == 3 and not live.ring.kinds(ContinueGeneration)


def test_what_has_been_set_is_noted_and_told_again(live: Live) -> None:
    live.client.post("/configure_logging", json={"log_level": "Warning", "log_requests_level": 0})
    live.client.post("/slow_down", json={"forward_sleep_time": 0.01})
    live.lose("scheduler", 1)
    live.client.post("/slow_down", json={"forward_sleep_time": 0.02})  # nobody is there to hear it
    live.client.post("/freeze_gc")
    count = len(live.ring.seen)
    live.replace(1)
    live.ring.wait_for(lambda: any(isinstance(message, SlowDown) for message in live.ring.seen[count:]))
    again = [message for message in live.ring.seen[count:] if isinstance(message, Tune | SlowDown)]
    assert again == [Tune(log_level="warning", freeze_gc=True), SlowDown(0.02)]
    live.client.post("/pause_generation", json={"mode": "in_place"})
    standing = read_run_config(Path(live.ring.runtime_dir) / "config.json").standing
    assert standing == Standing(
        log_level="warning", log_requests=False, log_requests_level=0, log_requests_format="text", step_sleep=0.02,
        paused=True, gc_frozen=True,
    )  # fmt: skip
    live.client.post("/continue_generation", json={})
    assert not read_run_config(Path(live.ring.runtime_dir) / "config.json").standing.paused


def test_who_kills_the_reader_of_its_text_is_told_so(live: Live) -> None:
    """Twice by its own doing, or at the third time; a request or a question, and nobody else."""
    live.ring.silent.set()
    calls = [
        begin(live, "/tokenize", prompt="bad"),
        begin(live, **call("bad", 9, rid="bad")),
        begin(live, **call("ok", 9)),
    ]
    live.ring.wait_for(lambda: len(live.ring.kinds(Generate)) == 3 and len(live.ring.kinds(Tokenize)) == 1)
    keys = [live.ring.kinds(Tokenize)[0].key, live.ring.by_rid("bad").key]
    for epoch, (key, certain) in enumerate(
        zip([*keys, *keys, keys[1]], [True, False, True, False, False], strict=True), 1
    ):
        assert not calls[1].done()
        live.lose("tokenizer", epoch, suspect=key, certain=certain)
    told = [one.result() for one in calls[:2]]
    assert [one.status_code for one in told] == [500, 500]
    assert "in the hands of the tokenizer at 2 of its deaths" in told[0].text
    assert "Request bad was in the hands of the tokenizer at 3 of its deaths" in told[1].text
    live.replace(5)
    assert calls[2].result().json()["text"] == expected("ok", 9)[0]


def test_a_question_that_the_scheduler_dies_of_again_and_again_is_given_up(live: Live) -> None:
    live.ring.silent.set()
    update = begin(live, "/update_weights", model_path="deadly")
    live.ring.wait_for(lambda: bool(live.ring.kinds(UpdateWeights)))
    for epoch in (1, 2, 3):
        assert not update.done()
        live.lose("scheduler", epoch)
        late = begin(live, "/get_weights_by_name", name="w", truncate_size=1)
        count = len(live.ring.kinds(UpdateWeights))
        live.ring.send(Serving(epoch, LIMITS))
        live.ring.wait_for(lambda epoch=epoch: len(live.ring.kinds(StartOver)) == epoch)
        if epoch == 3:
            assert len(live.ring.kinds(UpdateWeights)) == count
    told = update.result()
    assert told.status_code == 500 and "asked at 3 deaths of the scheduler" in told.json()["message"]
    live.ring.silent.clear()
    live.lose("scheduler", 4)
    live.replace(4)
    assert late.result().status_code == 200


def test_a_frontend_after_another_starts_over_and_serves_at_once() -> None:
    with live_frontend(warm=False, epoch=4) as live:
        live.ring.wait_for(lambda: bool(live.ring.kinds(StartOver)))
        (start_over,) = live.ring.kinds(StartOver)
        assert start_over.paused is None
        live.ring.send(Lost("scheduler", 3))  # these were meant for the one before
        live.ring.send(Serving(2, LIMITS))
        early = begin(live, **call("early", 3))
        live.ring.send(Serving(4, LIMITS))
        live.ring.wait_for(lambda: any(isinstance(message, Warm) for message in live.ring.launcher_seen))
        assert early.result().json()["text"] == expected("early", 3)[0]
        assert live.client.get("/health").status_code == 200
        generates = live.ring.kinds(Generate)
        assert not [message for message in generates if message.rid.startswith("WARM_UP")]
        assert min(message.key for message in generates) > start_over.before


def test_a_server_that_gives_up_fails_what_is_in_flight(live: Live) -> None:
    live.ring.silent.set()
    waiting = [begin(live, **call("abc", 9)), begin(live, "/tokenize", prompt="abc")]
    live.ring.wait_for(lambda: len(live.ring.kinds(Tokenize)) == 1 and len(live.ring.kinds(Generate)) == 2)
    live.ring.send(GiveUp("too many deaths"))
    answers = [one.result() for one in waiting]
    assert [answer.status_code for answer in answers] == [500, 500]
    assert all("too many deaths" in answer.text for answer in answers)
    assert live.process.wait(20) == 0


def test_health_probes_leave_no_question_behind(live: Live) -> None:
    live.lose("scheduler", 1)
    count = len(live.ring.kinds(QueryState))
    assert live.client.get("/health").status_code == 503
    assert len(live.ring.kinds(QueryState)) == count
    live.replace(1)
    assert live.client.post("/generate", json=call("x", 1)).status_code == 200
    assert live.client.get("/health").status_code == 200
    assert msgspec.json.decode(live.client.get("/server_info").content)["status"] == "ready"
