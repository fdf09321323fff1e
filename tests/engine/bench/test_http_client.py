"""The client against a small server that says exactly what a test wants, cut where it wants."""

from __future__ import annotations

import asyncio

import pytest

from engine.bench.errors import BenchError
from engine.bench.http_client import Connection, Generation, parse_url, request_bytes, run
from engine.bench.load import Sender

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def event(tokens: int, text: str = "x") -> bytes:
    meta = f'{{"prompt_tokens": 5, "cached_tokens": 2, "completion_tokens": {tokens}}}'
    return f'data: {{"text": "{text}", "meta_info": {meta}}}\n\n'.encode()


def chunked(*bodies: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(body), body) for body in bodies)


WHOLE = [event(1), event(2), event(3) + b"data: [DONE]\n\n"]
END = b"0\r\n\r\n"


def talk(pieces: list[bytes]) -> list[Generation]:
    """Send two streamed requests for three tokens on one connection to a server that answers each with `pieces`, one
    after the other, and then closes unless they end the answer."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.01)
            if not pieces or not pieces[-1].endswith(END):
                writer.close()
                return

    async def both() -> list[Generation]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        target = parse_url(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        try:
            sender = Sender(target, True, 3, 5.0, lambda: None)
            connection = await Connection.open(target)
            generation = await sender.send(connection, request_bytes(target, "GET", "/"))
            assert connection.reusable
            again = await sender.send(connection, request_bytes(target, "GET", "/"))
            connection.close()
            return [generation, again]
        finally:
            server.close()

    return run(both())


@pytest.mark.parametrize(
    "pieces",
    [
        [HEAD, *map(chunked, WHOLE), END],
        [HEAD + chunked(*WHOLE) + END],
        [HEAD, chunked(*WHOLE[:2]), chunked(event(3)), chunked(b"data: [DONE]\n\n"), END],
        # The empty line at an event's end cut in two, an event in three pieces, and one that begins in another's chunk.
        [HEAD, *map(chunked, [event(1)[:-1], b"\n", event(2)[:9], event(2)[9:20], event(2)[20:]]),
         chunked(event(3) + b"data: "), chunked(b"[DONE]\n"), chunked(b"\n"), END],
        [HEAD, chunked(event(1), event(2)[:-1]), chunked(b"\n" + event(3)[:5]), chunked(event(3)[5:-1]),
         chunked(b"\n"), chunked(b"data: [DONE]\n\n"), END],
        # Bytes of the transport cut anywhere.
        [bytes([byte]) for byte in (HEAD + chunked(*WHOLE))[:40]] + [(HEAD + chunked(*WHOLE))[40:] + END],
        [HEAD, chunked(event(1, "a\\n\\ndata: {"), event(2), event(3)), chunked(b"data: [DONE]\n\n"), END],
    ],
)  # fmt: skip
def test_events_are_counted_however_the_stream_is_cut(pieces: list[bytes]) -> None:
    for generation in talk(pieces):
        assert len(generation.events) == 3
        assert (generation.prompt_tokens, generation.cached_tokens, generation.output_tokens) == (5, 2, 3)
        assert generation.sent < generation.events[0] <= generation.events[-1] <= generation.finished
        assert list(generation.events) == sorted(generation.events)


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([HEAD, chunked(event(1)), chunked(event(2))], "the connection broke off after 2 events"),
        ([HEAD, chunked(event(1)), chunked(event(2)), END], "the stream ended without [DONE] after 2 events"),
        (
            [HEAD, chunked(event(1)), chunked(event(2) + b"data: [DONE]\n\n"), END],
            "3 output tokens were asked for, 2 ",
        ),
        ([HEAD, chunked(b'data: {"error": {"message": "too hot"}}\n\ndata: [DONE]\n\n'), END], "too hot"),
        ([HEAD, chunked(b"data: [DONE]\n\n"), END], "no generation"),
        ([], "the connection broke off after 0 events"),
        ([b"SSH-2.0-OpenSSH\r\n"], "the answer is not HTTP"),
        ([b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nfull"], "the server answered 503: full"),
    ],
)
def test_what_is_no_answer_is_said(pieces: list[bytes], said: str) -> None:
    with pytest.raises(BenchError) as error:
        talk(pieces)
    assert said in str(error.value)


def test_a_server_that_says_nothing_is_not_waited_for() -> None:
    async def silence() -> None:
        server = await asyncio.start_server(lambda reader, writer: asyncio.sleep(3), "127.0.0.1", 0)
        target = parse_url(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        connection = await Connection.open(target)
        try:
            await Sender(target, True, 1, 0.05, lambda: None).send(connection, request_bytes(target, "GET", "/"))
        finally:
            connection.close()
            server.close()

    with pytest.raises(BenchError, match=r"no answer within --timeout, 0\.05 s"):
        run(silence())


def test_a_request_carries_its_key_and_its_path() -> None:
    target = parse_url("http://[::1]:8000/behind/", api_key="secret")
    wire = request_bytes(target, "POST", "/generate", {"a": 1})
    head, _, body = wire.partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"POST /behind/generate HTTP/1.1",
        b"Host: [::1]:8000",
        b"Authorization: Bearer secret",
        b"Content-Type: application/json",
        b"Content-Length: 7",
    ]
    assert body == b'{"a":1}'
