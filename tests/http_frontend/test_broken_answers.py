"""An answer that cannot be written or told ends its own call; the ring is read on."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fake_ring import Live, call, events, expected
from test_journal import generate, step

from engine.wire.results import Finish
from engine.wire.to_frontend import Ended, Vectors
from engine.wire.to_scheduler import Abort
from http_frontend.journal import Entry, Journal


def test_an_answer_that_cannot_be_written(live: Live) -> None:
    """The prompt that the ring reports for GARBLE is no whole number of ids, which only its writing notices."""
    bad: dict[str, Any] = {"return_prompt_token_ids": True}
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(live.client.post, "/generate", json=call("fine", 30)) for _ in range(6)]
        plain = pool.submit(live.client.post, "/generate", json=call("GARBLE it", 9, rid="plain-one", **bad))
        stream = pool.submit(
            live.client.post, "/generate", json=call("GARBLE it", 900, rid="stream-one", stream=True, **bad)
        )
        answer = plain.result()
        assert (answer.status_code, answer.text) == (500, "Internal Server Error")
        assert answer.headers["content-type"].startswith("text/plain")
        last = events(stream.result())[-1]["meta_info"]
        assert last["finish_reason"]["status_code"] == 500 and last["id"] == "stream-one"
        assert "Internal Server Error" in last["finish_reason"]["message"]
        for other in others:
            assert other.result().json()["output_ids"] == expected("fine", 30)[1]
    live.ring.wait_for(lambda: live.ring.by_rid("stream-one").key in live.ring.aborted())
    assert live.process.stderr is not None
    log = os.read(live.process.stderr.fileno(), 1 << 16).decode()
    for rid in ("plain-one", "stream-one"):
        assert f"Request {rid} failed: its answer cannot be written" in log
    assert "Traceback" in log
    assert live.client.get("/health").status_code == 200


@pytest.mark.parametrize("at", ["news", "end", "ended", "vector"])
def test_an_owner_that_cannot_be_told_does_not_stop_the_others(at: str, caplog: pytest.LogCaptureFixture) -> None:
    sent: list[Any] = []
    told: list[Entry] = []
    journal = Journal(sent.append)

    def failing(entry: Entry) -> None:
        if len(told) < 1:
            told.append(entry)
            raise RuntimeError("deaf")
        told.append(entry)

    heard: list[int] = []
    journal.submit(
        [Entry(generate(1), failing, due=1), Entry(generate(2), lambda entry: heard.append(entry.key), due=1)]
    )
    entry = journal.match("rid1")[0]
    finish = Finish("length", length=1)
    match at:
        case "news":
            journal.text_step(step([(1, 0, "a", 5), (2, 0, "b", 6)]))
        case "end":
            journal.text_step(step([(1, 0, "a", 5), (2, 0, "b", 6)], finished={0: finish}))
        case "ended":
            journal.ended(Ended(1, 0, finish, "scheduler"))
            journal.text_step(step([(2, 0, "b", 6)]))
        case "vector":
            journal.vectors(Vectors([1, 2], [0, 0], [1, 1], [1, 1], bytes(8), {}, {}, "default"))
    assert heard == [2] and len(told) == 2
    assert entry.finish is not None and entry.finish.status == 500 and "rid1" in str(entry.finish.message)
    assert "Request rid1 failed" in caplog.text and "deaf" in caplog.text
    assert (Abort([1]) in sent) is (at == "news")
    assert not journal.match("rid1")
