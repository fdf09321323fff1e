"""What a real frontend refuses, ends or hangs up on so that its memory and its clients' patience stay bounded."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from fake_ring import Live, call, events, live_frontend

from engine.config.run import PooledFacts
from engine.wire.to_scheduler import Abort, QueryState
from engine.wire.to_tokenizer import Generate

RUNNING = 64
"""`LIMITS.max_running_requests` of the fake ring."""
FULL = {"object": "error", "message": "The request queue is full.", "type": "503", "param": None, "code": 503}


def in_time(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def generated(live: Live) -> list[Generate]:
    return [one for one in live.ring.kinds(Generate) if not one.rid.startswith(("WARM_UP", "HEALTH"))]


def send(live: Live, path: str, body: bytes, *headers: str) -> socket.socket:
    connection = live.socket()
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return connection


def status_of(connection: socket.socket) -> int:
    return int(connection.recv(1 << 16).split()[1])


def test_what_is_in_flight_fits_the_queue_and_the_rest_is_refused_at_once() -> None:
    with live_frontend(max_queued_requests=2) as live, ThreadPoolExecutor(2) as pool:
        live.ring.hold.set()
        batch = pool.submit(live.client.post, "/generate", json=call(["ab"] * (RUNNING + 1)))
        live.ring.wait_for(lambda: len(live.ring.running) == RUNNING + 1)
        two = live.client.post("/generate", json=call(["a", "b"]))
        assert (two.status_code, two.json(), two.headers["retry-after"]) == (503, FULL, "1")
        last = pool.submit(live.client.post, "/generate", json=call("abc"))
        live.ring.wait_for(lambda: len(live.ring.running) == RUNNING + 2)
        began = time.perf_counter()
        refused = live.client.post("/generate", json=call("a"))
        seconds = time.perf_counter() - began
        assert (refused.status_code, refused.json()) == (503, FULL)
        assert seconds < 1.0
        (chunk,) = events(live.client.post("/generate", json=call("a", stream=True)))
        finish = chunk["meta_info"]["finish_reason"]
        assert (chunk["text"], finish["type"], finish["status_code"]) == ("", "abort", 503)
        assert len(generated(live)) == RUNNING + 2
        assert live.client.get("/health").status_code == 200
        live.ring.hold.clear()
        assert (batch.result().status_code, last.result().status_code) == (200, 200)
        assert live.client.post("/generate", json=call(["a", "b"])).status_code == 200


def test_the_schedulers_word_that_its_queue_is_full_holds_until_something_has_moved() -> None:
    with live_frontend() as live, ThreadPoolExecutor(1) as pool:
        live.ring.hold.set()
        running = pool.submit(live.client.post, "/generate", json=call("abc"))
        live.ring.wait_for(lambda: bool(live.ring.running))
        assert live.client.post("/generate", json=call("QUEUE x")).status_code == 503
        sent = len(generated(live))
        assert live.client.post("/generate", json=call("abc")).json() == FULL
        assert len(generated(live)) == sent
        live.ring.hold.clear()
        assert running.result().status_code == 200
        assert live.client.post("/generate", json=call("abc")).status_code == 200


def test_prompt_tokens_that_wait_are_bounded() -> None:
    with live_frontend(max_queued_tokens=1000, context_length=10) as live, ThreadPoolExecutor(1) as pool:
        live.ring.hold.set()
        first = pool.submit(live.client.post, "/generate", json={"input_ids": [5] * 2000})
        live.ring.wait_for(lambda: bool(live.ring.running))
        refused = live.client.post("/generate", json={"input_ids": [5] * 2000})
        assert (refused.status_code, refused.json()) == (503, FULL)
        live.ring.hold.clear()
        assert first.result().status_code == 200


@pytest.mark.parametrize("most", [1000, 100_000])
def test_large_bodies_are_refused_before_they_are_read(most: int) -> None:
    with live_frontend(max_body_bytes=most) as live:
        told = send(live, "/generate", b"", f"Content-Length: {most + 1}", "Expect: 100-continue")
        answer = told.recv(1 << 16).decode()
        answer += "" if answer.endswith("}") else told.recv(1 << 16).decode()
        assert answer.startswith("HTTP/1.1 413 ")
        message = f"The body has more than {most} bytes, the most that are accepted."
        assert json.loads(answer.partition("\r\n\r\n")[2]) == {
            "object": "error", "message": message, "type": "413", "param": None, "code": 413,
        }  # fmt: skip
        chunk = b"%x\r\n%b\r\n" % (most * 6 // 10, b" " * (most * 6 // 10))
        for path in ("/generate", "/tokenize", "/abort_request", "/encode", "/update_weights"):
            chunked = send(live, path, chunk, "Transfer-Encoding: chunked")
            chunked.sendall(chunk)
            assert status_of(chunked) == 413, path
            chunked.close()
        told.close()
        ok = call("abc", rid="x" * (900 - len(json.dumps(call("abc", rid="")))))
        assert live.client.post("/generate", json=ok).status_code == 200
        assert not any("x" * 1000 in str(message) for message in live.ring.seen)


def test_the_bodies_of_all_calls_are_bounded() -> None:
    with live_frontend(max_body_bytes=1000) as live:
        opened = [send(live, "/generate", b"", "Content-Length: 1000") for _ in range(8)]
        in_time(lambda: live.client.post("/generate", json=call("a")).status_code == 503)
        assert live.client.get("/health").status_code == 200
        for connection in opened:
            connection.close()
        in_time(lambda: live.client.post("/generate", json=call("a")).status_code == 200)


@pytest.mark.parametrize("depth", [100, 300, 900, 100_000])
def test_deeply_nested_bodies(depth: int, live: Live) -> None:
    nested = "[" * depth + "]" * depth
    for path, body in {
        "/generate": f'{{"text": "a", "custom_labels": {{"a": {nested}}}, "sampling_params": {{"max_new_tokens": 1}}}}',
        "/tokenize": f'{{"messages": [{{"role": "user", "content": {nested}}}]}}',
    }.items():
        answer = live.client.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == (200 if depth == 100 else answer.status_code), answer.text
        assert answer.status_code in (200, 400), answer.text
        if path == "/tokenize" and depth > 128:
            assert answer.status_code == 400 and re.search("nested|recursion", answer.json()["message"])
    assert live.client.post("/generate", json=call("a")).status_code == 200


def test_open_calls_are_bounded_and_never_health() -> None:
    with live_frontend(max_open_streams=3, api_key="key") as live, ThreadPoolExecutor(3) as pool:
        headers = {"Authorization": "Bearer key"}
        live.ring.hold.set()
        waiting = [pool.submit(live.client.post, "/generate", json=call("a"), headers=headers) for _ in range(3)]
        live.ring.wait_for(lambda: len(live.ring.running) == 3)
        for path in ("/generate", "/encode", "/tokenize"):
            refused = live.client.post(path, json=call("a"), headers=headers)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.json()["message"] == "The server answers 3 calls at once, and as many are open."
        assert live.client.post("/generate", json=call("a")).status_code == 401
        assert [live.client.get(path).status_code for path in ("/health", "/ready", "/metrics")] == [200, 200, 404]
        assert live.client.get("/v1/models", headers=headers).status_code == 200
        assert live.client.post("/abort_request", json={"abort_all": True}, headers=headers).status_code == 200
        assert {call.result().status_code for call in waiting} == {200}


@pytest.mark.parametrize("flag", [True, False])
def test_a_request_that_takes_too_long_is_ended(flag: bool) -> None:
    limit = {"request_timeout": 0.3} if flag else {}
    field = {} if flag else {"timeout": 0.3}
    name = "the server's --request-timeout" if flag else "its timeout"
    message = f"The request took longer than {name} of 0.3 s."
    with live_frontend(**limit) as live:
        live.ring.hold.set()
        ended = live.client.post("/generate", json=call("abc", **field))
        assert (ended.status_code, ended.json()) == (503, FULL | {"message": message})
        parallel = call("abc", **field)
        parallel["sampling_params"]["n"] = 3
        assert live.client.post("/generate", json=parallel).json()["message"] == message
        live.ring.hold.clear()
        chunks = events(live.client.post("/generate", json=call("abc", 10**9, stream=True, **field)))
        finish = {"type": "abort", "message": message, "status_code": 503, "err_type": None}
        assert chunks[-1]["meta_info"]["finish_reason"] == finish
        assert chunks[-1]["output_ids"]
        live.ring.wait_for(lambda: not live.ring.running)
        assert len(live.ring.kinds(Abort)) == 3
        if flag:
            assert live.client.post("/generate", json=call("abc", timeout=60)).status_code == 200
            return
        for wrong in (0, -1.5):
            refused = live.client.post("/generate", json=call("abc", timeout=wrong))
            assert (
                refused.json()["error"]["message"] == f"timeout must be greater than 0 and finite, got {float(wrong)}."
            )
        assert live.client.post("/generate", json=call("abc", timeout=True)).json() == {
            "error": "invalid type: boolean `true`, expected f64"
        }


@pytest.mark.parametrize("path", ["/encode", "/classify"])
def test_a_vector_that_takes_too_long(path: str) -> None:
    with live_frontend(pooled=PooledFacts(kind="embedding", width=3)) as live:
        live.ring.hold.set()
        ended = live.client.post(path, json={"text": ["a", "b"], "timeout": 0.2})
        assert (ended.status_code, ended.headers["retry-after"]) == (503, "1")
        assert ended.json()["message"] == "The request took longer than its timeout of 0.2 s."
        assert live.client.post(path, json={"text": "a", "timeout": 0}).status_code == 400


def test_clients_that_do_not_go_on_are_hung_up_on() -> None:
    with live_frontend(request_read_timeout=0.5) as live:
        silent = live.socket()
        head = live.socket()
        head.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\n")
        body = send(live, "/generate", b'{"text"', "Content-Length: 100")
        bomb = live.socket()
        bomb.sendall(b"GET /health HTTP/1.1\r\nX: ")
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            for _ in range(100):
                bomb.sendall(b"x" * 65536)
                time.sleep(0.01)
        for connection in (silent, head, body):
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(100) == b""
            connection.close()
        assert live.client.get("/health").status_code == 200


def stalled(live: Live, tokens: int) -> socket.socket:
    """A stream of events of 10 KB and more that nobody reads."""
    body = json.dumps(call("x" * 2000, tokens, stream=True, return_prompt_token_ids=True)).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", live.port))
    head = (
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


def test_stalled_streams_take_little_memory_and_are_closed_in_the_end() -> None:
    streams = 60
    with live_frontend(stalled_stream_timeout=2.0, step_seconds=0.0) as live:
        before = psutil.Process(live.process.pid).memory_info().rss
        connections = [stalled(live, 2000) for _ in range(streams)]
        live.ring.wait_for(lambda: len(generated(live)) == streams and not live.ring.running, 60)
        assert live.client.get("/ping").status_code == 200
        grown = psutil.Process(live.process.pid).memory_info().rss - before
        assert grown < streams * (1 << 20), f"{grown / 1e6:.0f} MB"
        connections.append(stalled(live, 10**9))
        live.ring.wait_for(lambda: bool(live.ring.running))
        live.ring.wait_for(lambda: not live.ring.running, 60)
        assert len(live.ring.aborted()) >= 1
        for connection in connections:
            connection.close()


def test_an_answer_that_nobody_reads_is_not_kept() -> None:
    """Each of its chunks has 10 KB and more: what is not written is made only when it can be."""
    with live_frontend(step_seconds=0.005) as live:
        before = psutil.Process(live.process.pid).memory_info().rss
        connections = [stalled(live, 10**9) for _ in range(8)]
        live.ring.wait_for(lambda: len(live.ring.running) == 8)
        time.sleep(4.0)
        grown = psutil.Process(live.process.pid).memory_info().rss - before
        assert grown < 20 << 20, f"{grown / 1e6:.0f} MB"
        for connection in connections:
            connection.close()


def test_health_behind_a_full_queue_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick whatever the load, and no probe of it goes where requests wait."""
    monkeypatch.setenv("SGLANG_HEALTH_CHECK_TIMEOUT", "2")
    with live_frontend(max_queued_requests=1) as live, ThreadPoolExecutor(2) as pool:
        live.ring.hold.set()
        batch = pool.submit(live.client.post, "/generate", json=call(["a"] * (RUNNING + 1)))
        live.ring.wait_for(lambda: len(live.ring.running) == RUNNING + 1)
        time.sleep(0.4)  # until the newest sign of life is old
        seconds = []
        for _ in range(50):
            began = time.perf_counter()
            assert live.client.get("/health").status_code == 200
            seconds.append(time.perf_counter() - began)
        assert sorted(seconds)[25] < 0.1
        assert not [one for one in live.ring.kinds(Generate) if one.rid.startswith("HEALTH")]
        live.ring.silent.set()
        asked = len(live.ring.kinds(QueryState))
        in_time(lambda: live.client.get("/health").status_code == 503)
        began = time.perf_counter()
        for _ in range(5):
            assert live.client.get("/health").status_code == 503
        assert time.perf_counter() - began < 2.0
        assert len(live.ring.kinds(QueryState)) <= asked + 4
        live.ring.silent.clear()
        in_time(lambda: live.client.get("/health").status_code == 200)
        live.ring.hold.clear()
        assert batch.result().status_code == 200


def test_a_process_raises_its_limit_of_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, hard), hard))
    try:
        with live_frontend() as live:
            assert psutil.Process(live.process.pid).rlimit(psutil.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_beyond_the_limit_push_out_idle_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_TIMEOUT_KEEP_ALIVE", "60")
    with live_frontend(max_open_streams=1) as live:
        first = live.socket()
        first.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status_of(first) == 200
        others = [live.socket() for _ in range(130)]
        assert first.recv(100) == b""
        with httpx.Client(base_url=f"http://127.0.0.1:{live.port}") as client:
            assert client.get("/health").status_code == 200
        for connection in (first, *others):
            connection.close()


def test_in_a_rush_everyone_is_answered_and_health_passes_by() -> None:
    with live_frontend(max_queued_requests=2) as live, ThreadPoolExecutor(1) as pool:
        live.ring.hold.set()
        batch = pool.submit(live.client.post, "/generate", json=call(["ab"] * (RUNNING + 2)))
        live.ring.wait_for(lambda: len(live.ring.running) == RUNNING + 2)
        body = json.dumps(call("a")).encode()
        rush = [send(live, "/generate", body, f"Content-Length: {len(body)}") for _ in range(300)]
        assert live.client.get("/health").status_code == 200
        # The body comes after the head, the client leaves before its turn has come.
        late = send(live, "/generate", b"", f"Content-Length: {len(body)}")
        send(live, "/generate", body, f"Content-Length: {len(body)}").close()
        late.sendall(body)
        assert {status_of(connection) for connection in [*rush, late]} == {503}
        for connection in [*rush, late]:
            connection.close()
        live.ring.hold.clear()
        assert batch.result().status_code == 200
        assert live.client.post("/generate", json=call("a")).status_code == 200


def test_idle_connections_give_way_to_new_ones() -> None:
    with live_frontend(max_open_streams=8) as live, ThreadPoolExecutor(1) as pool:
        live.ring.hold.set()
        busy = pool.submit(live.client.post, "/generate", json=call("abc"))
        live.ring.wait_for(lambda: bool(live.ring.running))
        idle = [live.socket() for _ in range(600)]
        in_time(lambda: psutil.Process(live.process.pid).num_fds() < 300)
        last = idle[-1]
        last.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status_of(last) == 200
        live.ring.hold.clear()
        assert busy.result().status_code == 200
        for connection in idle:
            connection.close()


def test_a_body_of_millions_of_lists_is_refused_unread(live: Live) -> None:
    headers = {"content-type": "application/json"}
    process = psutil.Process(live.process.pid)
    before = process.memory_info().rss
    for path, field, one in (
        ("/generate", "sampling_params", "{}"),
        ("/generate", "custom_labels", "[]"),
        ("/encode", "nothing", "[]"),
        ("/tokenize", "messages", "{}"),
    ):
        body = f'{{"text": "a", "{field}": [' + ",".join([one] * 2_000_000) + "]}"
        refused = live.client.post(path, content=body, headers=headers)
        assert (refused.status_code, "2000002 lists and objects" in refused.text) == (400, True), refused.text
    brackets = live.client.post("/generate", json=call("[{" * 1_000_000))
    assert brackets.status_code == 200
    unfinished = '{"text": "' + '\\"[' * 1_000_000
    assert live.client.post("/generate", content=unfinished, headers=headers).status_code == 400
    assert process.memory_info().rss < before + (256 << 20)
