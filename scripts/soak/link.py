"""One connection of a client who may read as slowly as it likes, and hang up when it likes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httptools

from engine.bench.errors import LostConnectionError
from engine.bench.http_client import Target

_CHUNK = 1 << 16


class Link:
    """Raises LostConnectionError when the connection ends before an answer does."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._headed = self._complete = False
        self.headers: dict[str, str] = {}

    @classmethod
    async def open(cls, target: Target) -> Link:
        try:
            return cls(*await asyncio.open_connection(target.host, target.port))
        except OSError as error:
            raise LostConnectionError(f"no connection: {error}") from None

    async def ask(self, wire: bytes) -> int:
        """Send a request; the status, once the head of the answer is there."""
        self._headed = self._complete = False
        self.headers = {}
        await self.send(wire)
        while not self._headed:
            await self._read()
        return int(self._parser.get_status_code())

    async def send(self, wire: bytes) -> None:
        try:
            self._writer.write(wire)
            await self._writer.drain()
        except OSError as error:
            raise LostConnectionError(f"the request could not be sent: {error}") from None

    async def whole(self) -> bytes:
        """The body of the answer."""
        while not self._complete:
            await self._read()
        body, self._parts = b"".join(self._parts), []
        return body

    async def events(self) -> AsyncIterator[bytes]:
        """What stands behind `data: ` in each event of a stream."""
        rest = b""
        while True:
            pieces, self._parts = [rest, *self._parts], []
            *events, rest = b"".join(pieces).split(b"\n\n")
            for event in events:
                yield event.removeprefix(b"data: ")
            if self._complete:
                if rest:
                    yield rest  # no event: whoever reads it will say so
                return
            await self._read()

    def close(self) -> None:
        self._writer.close()

    def hang_up(self) -> None:
        """Without a goodbye, whatever is still to be sent or read."""
        self._writer.transport.abort()

    async def _read(self) -> None:
        try:
            data = await self._reader.read(_CHUNK)
        except OSError as error:
            raise LostConnectionError(f"the connection broke: {error}") from None
        if not data:
            raise LostConnectionError("the connection ended before the answer")
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise LostConnectionError(f"the answer is not HTTP: {error}") from None

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        self._headed = True

    def on_body(self, data: bytes) -> None:
        self._parts.append(data)

    def on_message_complete(self) -> None:
        self._complete = True
