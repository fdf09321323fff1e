"""One call of a client: its entries, what its coroutine waits for, and how its answer is sent.

Written as plain ASGI, which costs least.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from http_frontend.answers import failure
from http_frontend.bodies import Message, Receive
from http_frontend.journal import NEVER, Entry

Scope = dict[str, Any]
Send = Callable[[Message], Awaitable[None]]

BARE_SEND = "tokenmill.send"
"""Key of the ASGI scope under which the outermost application leaves the server's own `send`."""


class Call:
    """One call's entries, and the one thing its coroutine waits for: that some of them have news, or the client left.

    News are a set of entries: however many tokens come while a slow client is being served, an entry is written once.
    """

    __slots__ = ("_future", "_loop", "_news", "entries", "gone", "warmers")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._news: dict[int, Entry] = {}
        self._future: asyncio.Future[None] | None = None
        self.entries: list[Entry] = []
        self.warmers: list[Entry] = []
        self.gone = False

    def notify(self, entry: Entry) -> None:
        """For `Entry.notify`: the entry has news, and needs to say no more until it has been written."""
        entry.due = NEVER
        self._news[entry.index] = entry
        self._wake()

    def hang_up(self) -> None:
        """The client has gone."""
        self.gone = True
        self._wake()

    def rest(self) -> asyncio.Future[None]:
        """What to await when `news` has none: it is done when there are some, or the client has gone."""
        self._future = self._loop.create_future()
        return self._future

    def news(self) -> list[Entry]:
        """Entries with news, in order of their news. They count as told."""
        news = self._news
        if not news:
            return []
        self._news = {}
        return list(news.values())

    def _wake(self) -> None:
        future = self._future
        if future is not None:
            self._future = None
            if not future.done():
                future.set_result(None)


async def all_ended(call: Call) -> bool:
    """Wait until all entries have ended; false when the client has gone first.

    Raises the `RefusedError` of the first entry that fails the call.
    """
    left = len(call.entries)
    while left:
        entries = call.news()
        if call.gone:
            return False
        if not entries:
            await call.rest()
            continue
        for entry in entries:
            if (refused := failure(entry)) is not None:
                raise refused
        left -= len(entries)
    return True


async def watch(receive: Receive, call: Call) -> None:
    """Tell `call` when its client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    call.hang_up()


async def send_json(send: Send, body: bytes) -> None:
    """The whole of a 200 whose body is the JSON `body`."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send_last(send, body)


async def send_last(send: Send, body: bytes) -> None:
    """The last piece of an answer's body."""
    await send({"type": "http.response.body", "body": body, "more_body": False})
