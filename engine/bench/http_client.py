"""A client that costs as little as it can, because it shares the machine's cores with the server it measures.

Requests are bytes before the clock starts. Of a stream it keeps when each event came, and the bytes of the last ones;
nothing is decoded until the answer is complete.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Coroutine
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import httptools
import msgspec
import uvloop

from engine.bench.errors import BenchError, LostConnectionError

DONE = b"data: [DONE]"
_BODY_SHOWN = 500

T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """A server's address. `prefix` is the path of its URL, without a slash at the end."""

    url: str
    host: str
    port: int
    tls: bool = False
    prefix: str = ""
    api_key: str | None = None


@dataclass
class Answer:
    """One call's answer.

    sent, finished: when the call began and when its last byte had come (`perf_counter`). events: when each event of a
    stream came. body: all of a plain answer; of a stream, its end: the last event before [DONE], and [DONE].
    """

    sent: float
    status: int = 0
    events: array[float] = field(default_factory=lambda: array("d"))
    body: bytes = b""
    finished: float = 0.0


def parse_url(url: str, api_key: str | None = None) -> Target:
    """Raises ValueError, which says what is wrong with the URL."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r}: must be http://HOST:PORT or https://HOST:PORT")
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise ValueError(f"{url!r}: the port must be from 1 to 65535") from None
    prefix = parts.path.rstrip("/")
    return Target(url.rstrip("/"), parts.hostname, port, parts.scheme == "https", prefix, api_key)


def request_bytes(target: Target, method: str, path: str, body: Any = None) -> bytes:
    """A whole HTTP request, `body` as JSON."""
    payload = b"" if body is None else msgspec.json.encode(body)
    host = f"[{target.host}]" if ":" in target.host else target.host
    lines = [f"{method} {target.prefix}{path} HTTP/1.1", f"Host: {host}:{target.port}"]
    if target.api_key is not None:
        lines.append(f"Authorization: Bearer {target.api_key}")
    if body is not None:
        lines.append("Content-Type: application/json")
    lines += [f"Content-Length: {len(payload)}", "", ""]
    return "\r\n".join(lines).encode() + payload


class Connection(asyncio.Protocol):
    """One keep-alive connection; one exchange at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._future: asyncio.Future[None] | None = None
        self._answer = Answer(0.0)
        self._streamed = False
        self._now = 0.0
        self._parts: list[bytes] = []
        self._before: list[bytes] = []
        self._half_ended = False
        self.reusable = True

    @classmethod
    async def open(cls, target: Target) -> Connection:
        """Raises BenchError when nobody listens."""
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(cls, target.host, target.port, ssl=target.tls or None)
        except OSError as error:
            raise LostConnectionError(f"no connection to {target.url}: {error}") from None
        return connection

    async def exchange(self, wire: bytes, *, streamed: bool, sent: float | None = None) -> Answer:
        """Send one request and wait for the end of its answer, whatever its status.

        streamed: note when each event comes, and keep only the end of the body. sent: when the call began, if that was
        before now. Raises BenchError when the connection ends before the answer does.
        """
        assert self._transport is not None and self._future is None
        self._answer = Answer(perf_counter() if sent is None else sent)
        self._streamed = streamed
        self._parts, self._before = [], []
        self._future = asyncio.get_running_loop().create_future()
        self._transport.write(wire)
        try:
            await self._future
        finally:
            self._future = None
        return self._answer

    def close(self) -> None:
        self.reusable = False
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        self._now = perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"the answer is not HTTP: {error}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        events = len(self._answer.events)
        self._fail(f"the connection broke off after {events} events" + (f": {exc}" if exc is not None else ""))

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()
        self._streamed = self._streamed and self._answer.status == 200

    def on_body(self, data: bytes) -> None:
        """An event ends with an empty line, which JSON on one line cannot hold; a chunk is nearly always one event."""
        if not self._streamed:
            self._parts.append(data)
            return
        ends = data.count(b"\n\n")
        if self._half_ended and data[:1] == b"\n":
            ends += 1
        self._half_ended = data[-1:] == b"\n" and data[-2:] != b"\n\n"
        self._parts.append(data)
        for _ in range(ends):
            self._answer.events.append(self._now)
        if ends:
            self._before = [*self._before[-1:], b"".join(self._parts)]
            self._parts = []

    def on_message_complete(self) -> None:
        self._answer.finished = self._now
        self._answer.body = b"".join([*self._before, *self._parts])
        self.reusable = self.reusable and self._parser.should_keep_alive()
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    def _fail(self, message: str) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_exception(LostConnectionError(message))


class _Meta(msgspec.Struct):
    completion_tokens: int
    prompt_tokens: int = 0
    cached_tokens: int = 0


class _Generated(msgspec.Struct):
    meta_info: _Meta


_GENERATED = msgspec.json.Decoder(_Generated)


@dataclass(frozen=True)
class Generation:
    """What an answer of /generate says: when each event came, and how many tokens went in and out."""

    sent: float
    finished: float
    events: array[float]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


def read_generation(answer: Answer, *, streamed: bool, tokens: int) -> Generation:
    """Check an answer of /generate, of which exactly `tokens` output tokens are wanted.

    Raises BenchError for a refusal, a stream that broke off, and another number of tokens.
    """
    if answer.status != 200:
        raise BenchError(f"the server answered {answer.status}: {shown(answer.body)}")
    events = answer.events
    last = answer.body
    if streamed:
        written = [event for event in answer.body.split(b"\n\n") if event.strip()]
        if not written or written[-1].strip() != DONE:
            raise BenchError(f"the stream ended without [DONE] after {len(events)} events: {shown(answer.body[-200:])}")
        events = events[:-1]
        last = written[-2].removeprefix(b"data: ") if len(written) > 1 else b""
    try:
        meta = _GENERATED.decode(last).meta_info
    except msgspec.DecodeError:
        raise BenchError(f"the server's answer is no generation: {shown(last)}") from None
    if meta.completion_tokens != tokens:
        raise BenchError(f"{tokens} output tokens were asked for, {meta.completion_tokens} came: {shown(last)}")
    return Generation(answer.sent, answer.finished, events, meta.prompt_tokens, meta.cached_tokens, tokens)


def call(target: Target, method: str, path: str, body: Any = None, *, timeout: float = 60.0) -> Answer:
    """One plain call on a connection of its own, from code that has no event loop. Raises BenchError."""

    async def once() -> Answer:
        connection = await Connection.open(target)
        try:
            async with asyncio.timeout(timeout):
                return await connection.exchange(request_bytes(target, method, path, body), streamed=False)
        except TimeoutError:
            raise BenchError(f"{method} {target.url}{path}: no answer within {timeout:g} s") from None
        finally:
            connection.close()

    return run(once())


def call_json(target: Target, method: str, path: str, body: Any = None, *, timeout: float = 60.0) -> Any:
    """The JSON of a call that must be answered with 200. Raises BenchError."""
    answer = call(target, method, path, body, timeout=timeout)
    if answer.status != 200:
        raise BenchError(f"{method} {target.url}{path}: the server answered {answer.status}: {shown(answer.body)}")
    try:
        return msgspec.json.decode(answer.body)
    except msgspec.DecodeError:
        raise BenchError(f"{method} {target.url}{path}: the answer is not JSON: {shown(answer.body)}") from None


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, on the loop that costs least."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def shown(body: bytes) -> str:
    """The beginning of a body, for a message."""
    text = body.decode(errors="replace")
    return text if len(text) <= _BODY_SHOWN else text[:_BODY_SHOWN] + "..."
