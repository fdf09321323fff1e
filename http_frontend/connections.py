"""Connections that do not go on: uvicorn has a limit only for those that are idle between two requests.

A client owes us the rest of a head or body that it has begun, and has to read what it has asked for. Once a second all
connections are looked at, and those that are behind are closed; a stream whose client is gone in this way is aborted
like any other that was hung up.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import Iterable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from engine.config import ServerConfig
from http_frontend.auth import OPEN_PREFIXES
from http_frontend.turnstile import Turnstile

log = logging.getLogger(__name__)

LARGEST_HEAD = 64 << 10
"""Bytes of a request's line and headers."""
WRITE_BUFFER = 64 << 10
"""Bytes of an answer that wait here for a slow client; more of it is written only when these have left."""
LARGEST_FRAMES = 64 << 10
"""Bytes of a chunked body that are none of its own: the chunks' frames and what trails behind them. A body may have so
many, and `FRAMES_PER_BYTE` for each of its own."""
FRAMES_PER_BYTE = 8
LARGEST_REST = 1 << 20
"""Bytes of a body that are still read when its request has been answered without them."""
SPARE_FILES = 128
"""Descriptors that are no connection's."""
_AT_ONCE = tuple(b"GET " + path.encode() for path in (*OPEN_PREFIXES, "/ping"))
"""How requests begin that pass by those that wait at the turnstile."""
_SWEEP_SECONDS = 1.0


class WatchedConnection(HttpToolsProtocol):
    """Uvicorn's connection, which notes since when its client is behind.

    most: connections that may be open. turnstile: which requests pass. held: a request that waits there unread.
    idle: what is left of those that were idle when place was last made, and when they were heard, newest first.
    head_since: when the head began that is not whole; None between a head and the next. heard_at: the newest bytes.
    stalled_since: when the client had last read, if it does not read.
    in_body: a head is whole, its body is not. body_bytes, frame_bytes: of that body. rest_bytes: of it, since its
    request has been answered.
    """

    most = 1 << 30
    turnstile: Turnstile
    idle: list[tuple[float, WatchedConnection]]
    held: bytes | None = None
    head_since: float | None = None
    head_bytes = 0
    heard_at = 0.0
    stalled_since: float | None = None
    in_body = False
    body_bytes = frame_bytes = rest_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.turnstile.arrived()
        transport.set_write_buffer_limits(high=WRITE_BUFFER)
        self.head_since = self.heard_at = self.loop.time()
        if len(self.connections) > self.most:
            self._make_place()

    def _make_place(self) -> None:
        """Close the connection that has asked for nothing for the longest time: this one, if there is no other.

        Who opens connections in a rush closes one with each: all are looked at only when those that were idle at the
        last look have been closed, or heard of since.
        """
        idle = self.idle
        while idle:
            heard_at, oldest = idle.pop()
            if oldest in self.connections and oldest.heard_at == heard_at and oldest.is_idle():
                break
        else:
            all_of_them = [one for one in self.connections if isinstance(one, WatchedConnection) and one.is_idle()]
            idle += sorted(((one.heard_at, one) for one in all_of_them), key=lambda pair: pair[0], reverse=True)
            oldest = idle.pop()[1]
            log.warning("%d connections are open: for each new one an idle one is closed", len(self.connections))
        oldest.transport.abort()

    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.held is None and (self.cycle is None or self.cycle.response_complete)

    def data_received(self, data: bytes) -> None:
        self.heard_at = self.loop.time()
        goes_on = self.head_bytes > 0 or not self.is_idle()
        if goes_on or data.startswith(_AT_ONCE) or self.turnstile.admit(self._read_held, len(data)):
            self._read(data)
        else:
            self._unset_keepalive_if_required()
            self.held = data
            self.transport.pause_reading()

    def _read_held(self) -> None:
        """The turn of the request that waits has come, or can be waited for no longer."""
        data, self.held = self.held, None
        if data is not None and not self.transport.is_closing():
            self.transport.resume_reading()
            self._read(data)

    def shutdown(self) -> None:
        self._read_held()
        super().shutdown()

    def _read(self, data: bytes) -> None:
        in_head, in_body, body_bytes = self.head_since is not None, self.in_body, self.body_bytes
        super().data_received(data)
        if in_body and self.in_body:
            self._check_body(len(data) - (self.body_bytes - body_bytes))
        if in_head and self.head_since is not None and not self.transport.is_closing():
            self.head_bytes += len(data)
            if self.head_bytes > LARGEST_HEAD:
                self.send_400_response(f"The head of the request has more than {LARGEST_HEAD} bytes.")

    def _check_body(self, frame_bytes: int) -> None:
        """So many bytes have come that belong to the body, but are not of it."""
        self.frame_bytes += frame_bytes
        if self.frame_bytes > LARGEST_FRAMES + FRAMES_PER_BYTE * self.body_bytes:
            reason = "its request's body is frames and trailers for the most part"
        elif self.rest_bytes > LARGEST_REST:
            reason = "it goes on sending a body whose request has been answered"
        else:
            return
        log.info("closing the connection of %s: %s", self.client, reason)
        self.transport.close()

    def on_message_begin(self) -> None:
        self.head_since = self.heard_at
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        # RFC 9112, 3.2: what is asked of two hosts, or of none, is not to be answered; the parser makes a 400 of this.
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (hosts == 0 and self.parser.get_http_version() == "1.1"):
            raise ValueError(f"{hosts} Host headers")
        self.head_since = None
        self.head_bytes = 0
        self.in_body = True
        self.body_bytes = self.frame_bytes = self.rest_bytes = 0
        super().on_headers_complete()

    def on_header(self, name: bytes, value: bytes) -> None:
        # What trails behind a chunked body is no header: nothing is decided by it, a key least of all.
        if not self.in_body:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self.body_bytes += len(body)
        if self.cycle.response_complete:
            self.rest_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.in_body = False
        super().on_message_complete()

    def pause_writing(self) -> None:
        self.stalled_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self.stalled_since = None
        super().resume_writing()

    def behind(self, now: float, server: ServerConfig) -> str | None:
        """Why this connection is to be closed, if it is."""
        if self.stalled_since is not None:
            if now - self.stalled_since > server.stalled_stream_timeout:
                return f"its client has read nothing for {server.stalled_stream_timeout:g} s"
        elif self.head_since is not None:
            if now - self.head_since > server.request_read_timeout:
                return f"the head of its request was not whole within {server.request_read_timeout:g} s"
        elif self._owes_body() and now - self.heard_at > server.request_read_timeout:
            return f"nothing more of its request's body came within {server.request_read_timeout:g} s"
        return None

    def _owes_body(self) -> bool:
        cycle = self.cycle
        return cycle is not None and cycle.more_body and not self.flow.read_paused


async def sweep(connections: Iterable[Any], server: ServerConfig) -> None:
    """Close the connections that are behind, again and again."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        now = loop.time()
        for connection in [one for one in connections if isinstance(one, WatchedConnection)]:
            if (reason := connection.behind(now, server)) is not None:
                log.info("closing the connection of %s: %s", connection.client, reason)
                connection.transport.abort()


def connection_class(server: ServerConfig, turnstile: Turnstile) -> type[WatchedConnection]:
    """The class of a server's connections, of which as many may be open as it has files for, and some that are idle
    beside each that is being answered."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    streams = server.max_open_streams
    most = 2 * streams + SPARE_FILES
    if limit != resource.RLIM_INFINITY and limit < most + SPARE_FILES:
        most = max(1, limit - SPARE_FILES)
        log.warning("of %d files that may be open (ulimit -Hn), %d may be connections", limit, most)
        if most < streams:
            log.warning("--max-open-streams %d is more than that: connections beyond are closed", streams)
    return type("Connection", (WatchedConnection,), {"most": most, "turnstile": turnstile, "idle": []})
