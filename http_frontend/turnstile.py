"""Few calls at a time begin: what a call begins with (its head is parsed, its body decoded and planned, it is sent on
or refused) takes some tenths of a millisecond, and in a rush a thousand calls are there at once.

Between them the event loop looks at everything else: connections that come, health checks, tokens that streams
wait for. None of that has to wait for more than `CALLS` of them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

PATIENCE = 0.05
"""Seconds for which calls leave the loop to new connections, among which may be a health check, if these do not end."""
ACCEPTED = 16
"""Connections that are accepted in a turn of the loop at most."""
MANY = ACCEPTED // 2
CALLS = 4
"""Calls that begin in a turn of the loop: with one, they would wait until the last connection of a rush has come."""
MOST_BYTES = 16 << 20
"""Of requests that wait unread; what comes beyond is read at once, and its body counted as others are."""


class Turnstile:
    """Of one event loop. A call passes when its request comes (`admit`), and again before its body is decoded (`enter`)
    where that did not come with it."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[[], None], int]] = deque()
        self._bytes = 0
        self._turns = False
        self._free = 0
        self._arrived = 0
        self._turned_at = 0.0

    def admit(self, begin: Callable[[], None], size: int) -> bool:
        """Whether a request of `size` bytes may be read now; else `begin` is called when it may."""
        if not self._turns:
            self._start(asyncio.get_running_loop())
            self._free = 1
            return True
        if self._bytes + size > MOST_BYTES:
            return True
        self._bytes += size
        self._waiting.append((begin, size))
        return False

    async def enter(self) -> None:
        """Wait for the caller's turn, which is now where its request has just been admitted, or nobody else waits."""
        if self._free:
            self._free -= 1
            return
        loop = asyncio.get_running_loop()
        if not self._turns:
            self._start(loop)
            return
        future: asyncio.Future[None] = loop.create_future()
        self._waiting.append((lambda: _wake(future), 0))
        await future

    def arrived(self) -> None:
        """A connection has been accepted. Where many are in one turn there are more behind them."""
        self._arrived += 1

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._turns = True
        self._turned_at = loop.time()
        loop.call_soon(self._turn, loop)

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        """Once in each turn of the loop, until nobody waits."""
        if not self._waiting:
            self._turns = False
            return
        now = loop.time()
        arrived, self._arrived = self._arrived, 0
        try:
            if arrived < MANY or now - self._turned_at > PATIENCE:
                self._turned_at = now
                self._free = 0
                for _ in range(min(CALLS, len(self._waiting))):
                    begin, size = self._waiting.popleft()
                    self._bytes -= size
                    self._free += size > 0
                    begin()
        finally:  # after what has begun, which is to find its pass
            loop.call_soon(self._turn, loop)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():  # else its client has gone
        future.set_result(None)
