"""HTTP as no honest client speaks it, on a real frontend."""

from __future__ import annotations

import json
import os
import socket
import time

import psutil
import pytest
from fake_ring import Live, call, live_frontend
from test_overload import in_time, send, status_of

BODY = json.dumps(call("a", 1)).encode()
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
LENGTH = f"Content-Length: {len(BODY)}"
CHUNKS = "Transfer-Encoding: chunked"

AMBIGUOUS = {
    "length and chunks": ([LENGTH, CHUNKS], CHUNKED),
    "chunks and length": ([CHUNKS, LENGTH], CHUNKED),
    "two lengths": ([LENGTH, "Content-Length: 3"], BODY),
    "signed length": (["Content-Length: +5"], BODY),
    "negative length": (["Content-Length: -5"], BODY),
    "endless length": (["Content-Length: " + "9" * 30], BODY),
    "list of lengths": (["Content-Length: 5, 5"], BODY),
    "blank before the colon": ([f"Content-Length : {len(BODY)}"], BODY),
    "another coding": (["Transfer-Encoding: gzip"], BODY),
    "chunks first": ([f"{CHUNKS}, identity"], CHUNKED),
    "nearly chunks": (["Transfer-Encoding: xchunked"], CHUNKED),
    "folded": (["Transfer-Encoding:\r\n chunked"], CHUNKED),
    "a bare CR": ([f"X: a\r{CHUNKS}", LENGTH], BODY),
    "a NUL": (["X: a\0b", LENGTH], BODY),
    "no name": ([": x", LENGTH], BODY),
    "huge chunk": ([CHUNKS], b"F" * 17 + b"\r\n" + BODY),
    "negative chunk": ([CHUNKS], b"-1\r\n" + BODY),
    "chunk that ends elsewhere": ([CHUNKS], CHUNKED.replace(b"\r\n0", b"0")),
    "chunks without CR": ([CHUNKS], CHUNKED.replace(b"\r\n", b"\n")),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_a_body_whose_end_can_be_read_in_two_ways(case: str, live: Live) -> None:
    headers, body = AMBIGUOUS[case]
    connection = send(live, "/generate", body, *headers)
    answer = connection.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 400 ") and b"connection: close" in answer.lower(), answer
    connection.close()


@pytest.mark.parametrize(
    ("version", "hosts", "status"),
    [("1.1", 0, 400), ("1.1", 2, 400), ("1.1", 1, 200), ("1.0", 0, 200), ("1.0", 2, 400)],
)
def test_a_request_is_for_one_host(version: str, hosts: int, status: int, live: Live) -> None:
    lines = [f"GET /ping HTTP/{version}", *["host: x"] * hosts, "", ""]
    with live.socket() as connection:
        connection.sendall("\r\n".join(lines).encode())
        assert status_of(connection) == status


def test_no_key_trails_behind_a_body() -> None:
    trailer = b"0\r\nAuthorization: Bearer key\r\n\r\n"
    with live_frontend(api_key="key") as live:
        connection = send(live, "/generate", CHUNKED.replace(b"0\r\n\r\n", trailer), CHUNKS)
        assert status_of(connection) == 401
        connection.close()


def endless(live: Live, begin: bytes, unit: bytes, *headers: str, path: str = "/generate") -> float:
    """Send until the server hangs up; the megabytes that its process has grown by."""
    process = psutil.Process(live.process.pid)
    before = process.memory_info().rss
    connection = send(live, path, begin, *headers)
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        for _ in range(2000):
            connection.sendall(unit)
    connection.close()
    return (process.memory_info().rss - before) / 1e6


@pytest.mark.parametrize(
    ("begin", "unit"),
    [
        (b"0\r\n", b"a: b\r\n" * 4000),
        (b"0\r\n", b"a:\r\n" * 5000),
        (b"0\r\nX: ", b"x" * 20_000),
        (b"5;x=", b"y" * 20_000),
    ],
)
def test_frames_and_trailers_without_end(begin: bytes, unit: bytes, live: Live) -> None:
    assert endless(live, begin, unit, CHUNKS) < 20
    assert live.client.post("/generate", json=call("a")).status_code == 200


def test_a_body_in_the_smallest_chunks_is_a_body(live: Live) -> None:
    body = BODY + b" " * 50_000
    connection = send(live, "/generate", b"", CHUNKS, "Connection: close")
    connection.sendall(b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\nX: y\r\n\r\n")
    assert status_of(connection) == 200
    connection.close()


def test_a_body_that_goes_on_behind_its_answer() -> None:
    with live_frontend(api_key="key") as live:
        assert endless(live, b"", b"4e20\r\n" + b"x" * 20_000 + b"\r\n", CHUNKS) < 20


def test_a_head_without_end(live: Live) -> None:
    """It is not its time that is over: that would be in a minute."""
    connection = live.socket()
    connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        for _ in range(2000):
            connection.sendall(b"x" * 20_000)
    connection.close()
    assert live.client.get("/health").status_code == 200


@pytest.mark.parametrize("path", ["/get_weights_by_name", "/start_profile", "/configure_logging"])
def test_a_get_has_no_larger_body(path: str) -> None:
    with live_frontend(max_body_bytes=100_000) as live:
        connection = live.socket()
        head = f"GET {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}{CHUNKS}\r\n\r\n".encode() + (b"4e20\r\n" + b"x" * 20_000 + b"\r\n") * 6)
        assert status_of(connection) == 413
        told = live.socket()
        told.sendall(f"{head}Content-Length: 100001\r\n\r\n".encode())
        assert status_of(told) == 413
        connection.close()
        told.close()


def test_large_bodies_that_are_only_announced_take_nobodys_place() -> None:
    with live_frontend(max_body_bytes=1 << 20) as live:
        opened: list[socket.socket] = [send(live, "/generate", b"{", f"Content-Length: {1 << 20}") for _ in range(50)]
        time.sleep(0.2)
        assert live.client.post("/generate", json=call("a")).status_code == 200
        for connection in opened:
            connection.close()


def test_a_client_that_hangs_up_in_its_body_is_no_error_of_the_server() -> None:
    with live_frontend(log_level="info") as live:
        for path in ("/tokenize", "/configure_logging", "/encode", "/generate"):
            connection = send(live, path, b"{", "Content-Length: 100")
            time.sleep(0.1)
            connection.close()
        in_time(lambda: live.client.get("/health").status_code == 200)
        time.sleep(0.2)
        assert live.process.stderr is not None
        os.set_blocking(live.process.stderr.fileno(), False)
        log = live.process.stderr.read() or b""
        assert b"GET /health" in log and b"Traceback" not in log and b"ERROR" not in log, log.decode()
