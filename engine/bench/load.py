"""Sending the requests of one round: a closed loop of clients, or arrivals at given times."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from engine.bench.errors import BenchError
from engine.bench.http_client import Connection, Generation, Target, read_generation, run

# Servers close a connection that has been idle for five seconds; one that is about to be closed is not used again.
_IDLE_LIMIT = 2.0


@dataclass(frozen=True)
class Round:
    """wall: seconds from the first request to the end of the last answer. client_cpu: what this process spent in it."""

    generations: list[Generation]
    wall: float
    client_cpu: float


@dataclass(frozen=True)
class Sender:
    """How each request is sent; exactly `tokens` must come of it, and `done` is called after each."""

    target: Target
    streamed: bool
    tokens: int
    timeout: float
    done: Callable[[], None]

    async def send(self, connection: Connection, wire: bytes, sent: float | None = None) -> Generation:
        """Raises BenchError when no whole answer comes in time, or not the one that was asked for."""
        try:
            async with asyncio.timeout(self.timeout):
                answer = await connection.exchange(wire, streamed=self.streamed, sent=sent)
        except TimeoutError:
            raise BenchError(f"no answer within --timeout, {self.timeout:g} s") from None
        generation = read_generation(answer, streamed=self.streamed, tokens=self.tokens)
        self.done()
        return generation


def closed_loop(sender: Sender, wires: Sequence[bytes], clients: int) -> Round:
    """`clients` at once, each of which sends its next request when its last is answered, until all are sent.

    Connections are open before the clock starts.
    """

    async def client(connection: Connection, own: Sequence[bytes]) -> list[Generation]:
        answers = []
        for wire in own:
            if not connection.reusable:
                connection = await Connection.open(sender.target)
            answers.append(await sender.send(connection, wire))
        connection.close()
        return answers

    async def all_clients() -> Round:
        connections = await asyncio.gather(*(Connection.open(sender.target) for _ in range(clients)))
        with _clocks() as clocks:
            work = (client(connection, wires[number::clients]) for number, connection in enumerate(connections))
            found = await asyncio.gather(*work)
        return _round([answer for answers in found for answer in answers], clocks)

    return run(all_clients())


def open_loop(sender: Sender, wires: Sequence[bytes], times: Sequence[float]) -> Round:
    """Send each request at its time (seconds from the start), however many are in flight.

    A request counts as sent at its time, even if the client was late or had to open a connection first.
    """
    idle: list[tuple[float, Connection]] = []

    async def one(wire: bytes, due: float) -> Generation:
        await asyncio.sleep(due - time.perf_counter())
        connection = None
        while idle and connection is None:
            since, candidate = idle.pop()
            if candidate.reusable and time.perf_counter() - since < _IDLE_LIMIT:
                connection = candidate
        connection = connection or await Connection.open(sender.target)
        generation = await sender.send(connection, wire, sent=due)
        idle.append((time.perf_counter(), connection))
        return generation

    async def all_requests() -> Round:
        with _clocks() as clocks:
            begin = time.perf_counter()
            answers = await asyncio.gather(
                *(one(wire, begin + after) for wire, after in zip(wires, times, strict=True))
            )
        for _, connection in idle:
            connection.close()
        return _round(answers, clocks)

    return run(all_requests())


@contextmanager
def _clocks() -> Iterator[list[float]]:
    """The CPU seconds of this process in the block, appended at its end. No garbage is collected meanwhile."""
    spent: list[float] = []
    gc.collect()
    gc.disable()
    before = time.process_time()
    try:
        yield spent
    finally:
        spent.append(time.process_time() - before)
        gc.enable()


def _round(generations: list[Generation], clocks: list[float]) -> Round:
    wall = max(one.finished for one in generations) - min(one.sent for one in generations)
    return Round(generations, wall, clocks[0])
