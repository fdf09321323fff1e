"""Streams, refusals within them, aborts, hang-ups and slow clients of a real frontend process."""

from __future__ import annotations

import json
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx
import psutil
import pytest
from fake_ring import Live, call, events, expected, live_frontend


def test_cumulative_stream(live: Live) -> None:
    chunks = events(live.client.post("/generate", json=call("abc", 30, stream=True)))
    text, ids = expected("abc", 30)
    assert (chunks[-1]["text"], chunks[-1]["output_ids"]) == (text, ids)
    assert all(later["text"].startswith(earlier["text"]) for earlier, later in pairwise(chunks))
    assert [chunk["meta_info"]["finish_reason"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert all("index" not in chunk for chunk in chunks)
    assert "response_sent_to_client_ts" in chunks[0]["meta_info"]


def test_batch_streams_carry_an_index(live: Live) -> None:
    chunks = events(live.client.post("/generate", json=call(["a", "REFUSE bad value", "abc"], 6, stream=True)))
    last = {chunk["index"]: chunk for chunk in chunks}
    assert last[0]["text"] == expected("a", 6)[0]
    assert last[2]["text"] == expected("abc", 6)[0]
    error = {"message": "bad value", "type": "invalid_request_error", "code": 400, "retryable": False}
    assert last[1] == {"index": 1, "error": error}
    assert events(live.client.post("/generate", json=call([], stream=True))) == []


def test_refusals_plain_and_streamed(live: Live) -> None:
    refused = live.client.post("/generate", json=call("REFUSE bad value"))
    assert (refused.status_code, refused.json()) == (400, {"error": {"message": "bad value"}})
    error = {"message": "bad value", "type": "invalid_request_error", "code": 400, "retryable": False}
    assert events(live.client.post("/generate", json=call("REFUSE bad value", stream=True))) == [{"error": error}]
    own = events(live.client.post("/generate", json={"stream": True}))
    assert own[0]["error"]["message"] == "Either text, input_ids or input_embeds should be provided."

    full = live.client.post("/generate", json=call("QUEUE up"))
    assert (full.status_code, full.headers["retry-after"]) == (503, "1")
    assert full.json() == {
        "object": "error",
        "message": "The request queue is full.",
        "type": "503",
        "param": None,
        "code": 503,
    }
    (chunk,) = events(live.client.post("/generate", json=call("QUEUE up", stream=True)))
    reason = {"type": "abort", "message": "The request queue is full.", "status_code": 503, "err_type": None}
    assert (chunk["text"], chunk["meta_info"]["finish_reason"]) == ("", reason)

    broken = live.client.post("/generate", json=call("BREAK it", 9))
    assert (broken.status_code, broken.json()["type"]) == (500, "500")
    chunks = events(live.client.post("/generate", json=call("BREAK it", 9, stream=True)))
    assert len(chunks[-1]["output_ids"]) == 3
    assert chunks[-1]["meta_info"]["finish_reason"]["status_code"] == 500
    wrong = live.client.post("/generate", json={"text": 5, "stream": True})
    assert (wrong.status_code, wrong.json()["object"]) == (400, "error")


def test_a_failing_item_fails_the_batch_and_aborts_the_rest(live: Live) -> None:
    refused = live.client.post("/generate", json=call(["long one", "REFUSE bad"], 1_000_000, rid="fail"))
    assert (refused.status_code, refused.json()) == (400, {"error": {"message": "bad"}})
    live.ring.wait_for(lambda: live.ring.by_rid("fail_0").key in live.ring.aborted())


def test_abort_by_prefix_and_all(live: Live) -> None:
    client = live.client
    live.ring.hold.set()
    try:
        with ThreadPoolExecutor(3) as pool:
            waiting = pool.submit(client.post, "/generate", json=call(["a", "b"], rid="gone"))
            other = pool.submit(client.post, "/generate", json=call("c", rid="stays"))
            live.ring.wait_for(lambda: len([one for one in live.ring.running.values() if one.generate.rid]) >= 3)
            duplicate = client.post("/generate", json=call("c", rid="stays"))
            assert duplicate.json() == {"error": {"message": "Duplicate request ID detected: stays"}}
            assert client.post("/abort_request", json={}).status_code == 200
            assert client.post("/abort_request", json={"rid": "gon"}).content == b""
            for answer in waiting.result().json():
                reason = answer["meta_info"]["finish_reason"]
                assert (reason["type"], reason["message"]) == ("abort", "Abort in waiting queue")
                assert answer["text"] == ""
            assert not other.done()
            assert client.post("/abort_request", json={"abort_all": "true"}).status_code == 200
            assert other.result().json()["meta_info"]["finish_reason"]["type"] == "abort"
    finally:
        live.ring.hold.clear()
    assert "Field required" in client.post("/abort_request").json()["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_aborts_its_own_request_only(live: Live, stream: bool) -> None:
    rid = f"hangs_up_{stream}"
    body = json.dumps(call("a", 1_000_000, stream=stream, rid=rid)).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(live.client.post, "/generate", json=call("abc", 300))
        with live.socket() as client:
            client.sendall(head.encode() + body)
            live.ring.wait_for(
                lambda: any(one.generate.rid == rid and one.made > 2 for one in live.ring.running.values())
            )
        live.ring.wait_for(lambda: live.ring.by_rid(rid).key in live.ring.aborted())
        assert other.result().json()["text"] == expected("abc", 300)[0]


def test_a_slow_client_gets_fewer_chunks_and_costs_no_memory(live: Live) -> None:
    """A cumulative stream of 8,000 tokens would queue 300 MB, if every chunk were kept for its reader."""
    tokens = 8_000
    body = json.dumps(call("a", tokens, stream=True, rid="slow")).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    frontend = psutil.Process(live.process.pid)
    before = frontend.memory_info().rss
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    with client:
        client.settimeout(60)
        client.connect(("127.0.0.1", live.port))
        client.sendall(head.encode() + body)
        key = live.ring.by_rid
        live.ring.wait_for(lambda: any(one.generate.rid == "slow" for one in live.ring.running.values()))
        live.ring.step_seconds = 0.0
        live.ring.wait_for(lambda: key("slow").key not in live.ring.running, 120)
        live.ring.step_seconds = 0.001
        assert live.client.post("/generate", json=call("abc")).status_code == 200
        assert frontend.memory_info().rss - before < 60 * 2**20
        received = bytearray()
        while not received.endswith(b"0\r\n\r\n"):
            received += client.recv(1 << 20)
    assert received.count(b"data: {") < tokens / 10
    assert received.count(b"data: [DONE]") == 1
    assert b'"completion_tokens":%d' % tokens in received


def test_incremental_streams_and_intervals() -> None:
    with live_frontend(incremental_streaming_output=True, step_seconds=0.005, skip_server_warmup=True) as live:
        body = call("abc", 21, stream=True, return_logprob=True)
        body["sampling_params"]["stream_interval"] = 10
        chunks = events(live.client.post("/generate", json=body))
        text, ids = expected("abc", 21)
        assert "".join(chunk["text"] for chunk in chunks) == text
        assert [token for chunk in chunks for token in chunk["output_ids"]] == ids
        assert len(chunks) <= 4
        counts = [chunk["meta_info"]["completion_tokens"] for chunk in chunks]
        assert counts == [chunk["meta_info"]["output_token_logprobs_length"] for chunk in chunks]
        assert counts == sorted(counts)
        plain = live.client.post("/generate", json=call("abc", 5)).json()
        assert plain["text"] == expected("abc", 5)[0]


def test_many_streams_at_once_leave_nothing_behind(live: Live) -> None:
    """Half of 60 clients hang up midway; all others are right, and no descriptor is left open."""
    frontend = psutil.Process(live.process.pid)
    live.client.get("/health")
    descriptors = frontend.num_fds()
    failures: list[str] = []

    def visit(number: int) -> None:
        prompt = "x" * (number % 7 + 1)
        with httpx.Client(base_url=live.client.base_url, timeout=30) as client:
            with client.stream("POST", "/generate", json=call(prompt, 60, stream=True)) as response:
                lines = (line for line in response.iter_lines() if line)
                last = ""
                for i, line in enumerate(lines):
                    if number % 2 and i == 3:
                        return
                    last = line if line != "data: [DONE]" else last
            if json.loads(last.removeprefix("data: "))["text"] != expected(prompt, 60)[0]:
                failures.append(prompt)

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    live.ring.wait_for(lambda: not live.ring.running)
    assert live.client.get("/flush_cache?timeout=1").status_code == 200
    for _ in range(100):
        if frontend.num_fds() <= descriptors + 2:
            break
        live.client.get("/health")
    assert frontend.num_fds() <= descriptors + 2


@pytest.mark.parametrize("path", ["/generate", "/tokenize", "/abort_request", "/v1/score", "/pause_generation"])
def test_a_client_that_hangs_up_in_the_middle_of_its_body_is_no_error(path: str) -> None:
    """It is nothing that the log should hold a traceback of: any client could fill it."""
    with live_frontend() as live:
        with live.socket() as client:
            client.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
            client.shutdown(socket.SHUT_WR)
            assert client.recv(100) == b""
        assert live.client.get("/health").status_code == 200
        assert live.process.stderr is not None
        os.set_blocking(live.process.stderr.fileno(), False)
        assert b"Traceback" not in (live.process.stderr.read() or b"")
