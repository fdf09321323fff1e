"""The order in which calls begin, on a loop without sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from http_frontend.connections import WatchedConnection
from http_frontend.turnstile import ACCEPTED, CALLS, MOST_BYTES, Turnstile


def on_loop(play: Callable[[Turnstile], Awaitable[None]]) -> None:
    async def whole() -> None:
        await play(Turnstile())

    asyncio.run(whole())


def many(turnstile: Turnstile) -> None:
    """As many connections as there may be in a turn."""
    for _ in range(ACCEPTED):
        turnstile.arrived()


def test_few_calls_begin_in_a_turn_of_the_loop_in_order() -> None:
    async def play(turnstile: Turnstile) -> None:
        turn, begun = 0, []

        async def call(number: int) -> None:
            await turnstile.enter()
            begun.append((number, turn))

        calls = [asyncio.create_task(call(number)) for number in range(10)]
        while not all(one.done() for one in calls):
            turn += 1
            await asyncio.sleep(0)
        assert [number for number, _ in begun] == list(range(10))
        turns = [turn for _, turn in begun]
        assert max(turns.count(one) for one in turns) <= CALLS

    on_loop(play)


def test_a_request_that_was_admitted_waits_only_once() -> None:
    async def play(turnstile: Turnstile) -> None:
        assert turnstile.admit(lambda: None, 1)
        await turnstile.enter()
        begun: list[int] = []

        async def body(number: int) -> None:
            await turnstile.enter()
            begun.append(number)

        def begin(number: int) -> Callable[[], None]:
            return lambda: tasks.append(asyncio.create_task(body(number)))

        tasks: list[asyncio.Task[None]] = []
        assert not any(turnstile.admit(begin(number), 1) for number in range(5))
        while len(begun) < 5:
            # Whoever is called before the others is done before them.
            assert len(tasks) - len(begun) <= CALLS
            if len(tasks) % 2:
                many(turnstile)  # turns that are left to others do not cost it its pass
            await asyncio.sleep(0)
        assert begun == list(range(5))

    on_loop(play)


def test_new_connections_come_first_but_not_for_ever() -> None:
    async def play(turnstile: Turnstile) -> None:
        began = asyncio.get_running_loop().time()
        _, call = [asyncio.create_task(turnstile.enter()) for _ in range(2)]
        for _ in range(20):
            many(turnstile)
            await asyncio.sleep(0)
        assert not call.done() or asyncio.get_running_loop().time() - began > 0.05
        while not call.done():
            many(turnstile)
            await asyncio.sleep(0)

    on_loop(play)


def test_who_leaves_the_queue_and_who_raises_hold_up_nobody() -> None:
    async def play(turnstile: Turnstile) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, _context: None)
        _, gone = [asyncio.create_task(turnstile.enter()) for _ in range(2)]
        await asyncio.sleep(0)
        assert gone.cancel()

        def broken() -> None:
            raise ValueError("on purpose")

        assert not turnstile.admit(broken, 1)
        await asyncio.wait_for(turnstile.enter(), 10)

    on_loop(play)


def test_bytes_that_wait_are_bounded() -> None:
    async def play(turnstile: Turnstile) -> None:
        assert turnstile.admit(lambda: None, 1)
        assert not turnstile.admit(lambda: None, MOST_BYTES)
        assert turnstile.admit(lambda: None, 1)
        for _ in range(5):
            await asyncio.sleep(0)
        assert turnstile.admit(lambda: None, 1)
        assert not turnstile.admit(lambda: None, MOST_BYTES)

    on_loop(play)


def test_health_passes_by_those_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    connection: Any = WatchedConnection.__new__(WatchedConnection)
    connection.loop = SimpleNamespace(time=lambda: 0.0)
    connection.transport = SimpleNamespace(pause_reading=lambda: None)
    connection.turnstile = SimpleNamespace(admit=lambda *_: False)
    connection.cycle = None
    read: list[bytes] = []
    monkeypatch.setattr(connection, "_read", read.append)
    monkeypatch.setattr(connection, "_unset_keepalive_if_required", lambda: None)
    paths = ("/health", "/health_generate", "/ready", "/metrics", "/ping")
    for path in paths:
        connection.data_received(f"GET {path} HTTP/1.1".encode())
    assert (len(read), connection.held) == (len(paths), None)
    connection.data_received(b"POST /generate HTTP/1.1")
    assert (len(read), connection.held) == (len(paths), b"POST /generate HTTP/1.1")
