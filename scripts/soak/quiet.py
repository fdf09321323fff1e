"""Quiet points: the clients hold their breath, and the server must have nothing left of what they asked."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from typing import Any

import msgspec

from scripts.soak.clients import Clients
from scripts.soak.operator import healthy
from scripts.soak.table import Job
from scripts.soak.tree import Tree

_SETTLING = 20.0
"""Seconds in which a server must have got rid of what was asked of it."""
_IN_FLIGHT = re.compile(rb"^tokenmill:requests_in_flight\{[^}]*\} (\S+)$", re.MULTILINE)


@dataclass
class Quiet:
    """points: quiet points so far. disturbed: held by those who disturb the server, one lock for each of them.
    pool_bytes: of the KV pool."""

    clients: Clients
    tree: Tree
    disturbed: tuple[asyncio.Lock, asyncio.Lock]
    points: int = 0
    pool_bytes: int = 0

    async def every(self, seconds: float, until: float) -> None:
        while time.monotonic() + seconds < until:
            await asyncio.sleep(seconds)
            await self.point()

    async def point(self) -> None:
        """Close the gate, wait until all is still, look, and open it again."""
        ledger = self.clients.ledger
        async with self.disturbed[0], self.disturbed[1]:
            self.clients.gate.clear()
            deadline = time.monotonic() + self.clients.patience + 10
            while self.clients.running and time.monotonic() < deadline:  # noqa: ASYNC110 many clients, one look
                await asyncio.sleep(0.05)
            if self.clients.running:
                ledger.violation(f"still running at a quiet point: {self.clients.running}")
            if await healthy(self.clients, ledger, time.monotonic() + 60):
                await self._look()
            self.points += 1
            self.clients.gate.set()

    async def _look(self) -> None:
        ledger, tree = self.clients.ledger, self.tree
        if not await self._empty():
            return
        for fault in tree.faults():
            ledger.violation(fault)
        tree.sample()
        status, _, body = await self.clients.ask(Job("flush", "call", "/flush_cache?timeout=10", {}))
        if status != 200:
            ledger.violation(f"the cache of an idle server could not be flushed: {status} {body[:200]!r}")
        state = await self._state()
        if state["num_free_tokens"] != state["memory_usage"]["token_capacity"]:
            ledger.violation(f"slots of the KV pool are missing when idle: {state}"[:600])

    async def _empty(self) -> bool:
        """Wait until nothing runs, waits, holds slots, is in the journal, or keeps a connection open."""
        deadline = time.monotonic() + _SETTLING
        while True:
            load = (await self._json("/v1/loads"))["loads"][0]
            self.pool_bytes = int(load["memory"]["kv_cache_gb"] * 1e9)
            _, _, page = await self.clients.ask(Job("metrics", "call", "/metrics", None, method="GET"))
            found = _IN_FLIGHT.search(page)
            await asyncio.sleep(0.05)  # the connection of that question ends as well
            left = {name: load[name] for name in ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")}
            left |= {"in the journal": float(found[1]) if found else -1, "connections": self.tree.clients()}
            if not any(left.values()):
                return True
            if time.monotonic() > deadline:
                self.clients.ledger.violation(f"left after {_SETTLING:g} idle seconds: {left}")
                return False

    async def _state(self) -> Any:
        return (await self._json("/server_info"))["internal_states"][0]

    async def _json(self, path: str) -> Any:
        status, _, body = await self.clients.ask(Job(path, "call", path, None, method="GET"))
        if status != 200:
            self.clients.ledger.violation(f"{path}: answered {status} when idle: {body[:200]!r}")
        return msgspec.json.decode(body)
