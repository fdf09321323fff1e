"""The clients: each asks for something, looks at what comes, and asks again where the books allow it."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec

from engine.bench.errors import LostConnectionError
from engine.bench.http_client import Target
from scripts.soak.answers import (
    GivenUpError,
    Item,
    RefusedError,
    WrongError,
    check_beginning,
    check_failure,
    check_status,
    compare,
    decoded,
    items_of,
    was_aborted,
)
from scripts.soak.ledger import Ledger
from scripts.soak.link import Link
from scripts.soak.table import Job

FATES = {"plain": 30, "stream": 34, "slow": 4, "abort": 10, "abort early": 4, "leave": 10, "leave early": 8}
PROBES = ("/health", "/health_generate", "/ready", "/v1/loads", "/server_info", "/model_info", "/v1/models", "/metrics")
_SLOWNESS = 0.05


@dataclass
class Clients:
    """What all clients share. oracle: the answers of an undisturbed server, by job. running: what is being asked now,
    and since when. patience: seconds after which a request counts as hung."""

    target: Target
    table: list[Job]
    ledger: Ledger
    random: random.Random
    patience: float
    oracle: dict[str, Any] = field(default_factory=dict)
    running: dict[str, float] = field(default_factory=dict)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    _number: int = 0

    def wire(self, job: Job, **more: Any) -> tuple[str, bytes]:
        """A rid that nobody has had, and the bytes of the job as a request under it."""
        self._number += 1
        rid = f"soak-{self._number}-"
        body = job.body
        if job.kind == "generation":
            body = {**body, "rid": rid, **more}
        payload = body if isinstance(body, bytes) else b"" if body is None else msgspec.json.encode(body)
        head = f"{job.method} {job.path} HTTP/1.1\r\nHost: {self.target.host}\r\n"
        if job.body is not None:
            head += "Content-Type: application/json\r\n"
        return rid, f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload

    async def ask(self, job: Job, **more: Any) -> tuple[int, dict[str, str], bytes]:
        """One plain exchange on a connection of its own."""
        link = await Link.open(self.target)
        try:
            status = await link.ask(self.wire(job, **more)[1])
            return status, link.headers, await link.whole()
        finally:
            link.close()

    async def learn(self) -> None:
        """Fill the oracle, a few requests at a time."""
        left = list(self.table)

        async def pupil() -> None:
            while left:
                await self._learn(left.pop())

        await asyncio.gather(*(pupil() for _ in range(4)))

    async def _learn(self, job: Job) -> None:
        status, _, body = await self.ask(job)
        if status // 100 != (4 if job.kind == "bad" else 2):
            raise WrongError(f"{job.name}: answered {status}: {body[:200]!r}")
        if job.kind == "bad":
            self.oracle[job.name] = status, decoded(body)
        elif job.kind == "generation":
            self.oracle[job.name] = [item.essence() for item in items_of(body)]
        else:
            self.oracle[job.name] = decoded(body)

    async def work(self, until: float) -> None:
        """Ask for one thing after the other, as long as the gate is open."""
        while time.monotonic() < until:
            await self.gate.wait()
            dice = self.random.random()
            if dice < 0.06:
                await self.probe(self.random.choice(PROBES))
            elif dice < 0.075:
                job = self.random.choice(self.table)
                await asyncio.gather(*(self.settle(job, "plain") for _ in range(12)))
            else:
                job = self.random.choice(self.table)
                fate = self.random.choices([*FATES], [*FATES.values()])[0]
                await self.settle(job, fate if job.kind == "generation" or fate == "leave early" else "plain")

    async def settle(self, job: Job, fate: str) -> None:
        """Ask until there is an answer, or an end of another kind that is right."""
        self.ledger.asked += 1
        name = f"{job.name} ({fate}) {self.ledger.asked}"
        tries = 0
        self.running[name] = time.monotonic()
        try:
            while not await self._settled(name, job, fate):
                tries += 1
                await asyncio.sleep(min(0.2 * tries, 2.0) * (0.5 + self.random.random()))
        finally:
            del self.running[name]

    async def _settled(self, name: str, job: Job, fate: str) -> bool:
        """Ask once; whether that is the end of it."""
        sent = time.monotonic()
        try:
            async with asyncio.timeout(self.patience):
                outcome = await self._once(job, fate, sent)
        except LostConnectionError as error:
            unread = sum(item["completion_tokens"] for item in self.oracle[job.name]) if fate == "slow" else 0
            self.ledger.incident("lost", f"{name}: {error}", sent, behind=_SLOWNESS * unread)
            self.ledger.requests["connection lost with the frontend, asked again"] += 1
        except RefusedError:
            self.ledger.requests["refused with 503, asked again"] += 1
        except GivenUpError as error:
            self.ledger.incident("given up", f"{name}: {error}", sent)
            self.ledger.requests["given up after several deaths of the scheduler (500), asked again"] += 1
        except TimeoutError:
            self.ledger.violation(f"{name}: no end within {self.patience:g} s")
            self.ledger.requests["hung"] += 1
            return True
        except (WrongError, msgspec.DecodeError, KeyError, TypeError) as error:
            self.ledger.violation(f"{name}: {type(error).__name__}: {error}")
            self.ledger.requests["wrong"] += 1
            return True
        else:
            self.ledger.requests[outcome] += 1
            self.ledger.kinds[f"{job.kind}, {fate}"] += 1
            return True
        return False

    async def probe(self, path: str) -> None:
        """A question about the server's own state."""
        self.ledger.asked += 1
        name, sent = f"{path} {self.ledger.asked}", time.monotonic()
        self.running[name] = sent
        try:
            async with asyncio.timeout(self.patience):
                status, _, body = await self.ask(Job(path, "call", path, None, method="GET"))
        except LostConnectionError as error:
            self.ledger.incident("lost", f"{name}: {error}", sent)
            self.ledger.requests["probe whose connection was lost with the frontend"] += 1
        except TimeoutError:
            self.ledger.violation(f"{name}: no answer within {self.patience:g} s")
        else:
            if status == 503 and path in ("/health", "/health_generate", "/ready"):
                self.ledger.incident("not ready" if path == "/ready" else "unhealthy", name, sent)
                self.ledger.requests["probe: 503 while a process was dead, or paused"] += 1
            elif status != 200:
                self.ledger.violation(f"{name}: answered {status}: {body[:200]!r}")
            else:
                self.ledger.requests["probe: 200"] += 1
        finally:
            del self.running[name]

    async def _once(self, job: Job, fate: str, sent: float) -> str:
        if fate == "leave early":
            return await self._leave_early(job)
        if job.kind != "generation":
            return await self._call(job, sent)
        link = await Link.open(self.target)
        try:
            if fate == "plain" or (fate == "abort early" and self.random.random() < 0.5):
                items = await self._plain(link, job, fate)
            else:
                found = await self._stream(link, job, fate)
                if found is None:
                    return "left by its client in mid-stream"
                items = found
        finally:
            link.close()
        return self._judge(job, fate, items, sent)

    async def _leave_early(self, job: Job) -> str:
        """Hang up before the request is whole, or before the answer begins."""
        _, wire = self.wire(job, stream=self.random.random() < 0.5)
        cut = self.random.randrange(len(wire)) if self.random.random() < 0.5 else len(wire)
        link = await Link.open(self.target)
        try:
            await link.send(wire[:cut])
            await asyncio.sleep(self.random.random() * 0.2)
        finally:
            link.hang_up()
        return "left by its client before the first byte"

    async def _call(self, job: Job, sent: float) -> str:
        status, headers, body = await self.ask(job)
        if status == 503:
            _check_retry_after(headers)
            raise RefusedError(body.decode())
        if job.kind == "bad" and status == 200 and any(map(was_aborted, items_of(body))):
            # It has waited for the tokenizer, which would have refused it.
            self.ledger.incident("aborted", job.name, sent)
            return "aborted with all others, as asked"
        if job.kind == "bad":
            if (found := (status, decoded(body))) != self.oracle[job.name]:
                raise WrongError(f"{found} instead of {self.oracle[job.name]}")
            return "refused with 4xx, rightly"
        if status != 200:
            check_status(status, body.decode(errors="replace"))
        if (answer := decoded(body)) != self.oracle[job.name]:
            raise WrongError(f"{answer} instead of {self.oracle[job.name]}"[:400])
        return "answered right"

    async def _plain(self, link: Link, job: Job, fate: str) -> list[Item]:
        rid, wire = self.wire(job)
        aborting = asyncio.create_task(self._abort_soon(rid)) if fate == "abort early" else None
        try:
            status = await link.ask(wire)
            body = await link.whole()
        finally:
            if aborting is not None:
                await aborting
        if status == 503:
            _check_retry_after(link.headers)
        if status != 200:
            check_status(status, body.decode(errors="replace"))
        return items_of(body)

    async def _stream(self, link: Link, job: Job, fate: str) -> list[Item] | None:
        """The items of a stream; None if the client has left it."""
        rid, wire = self.wire(job, stream=True)
        aborting = asyncio.create_task(self._abort_soon(rid)) if fate == "abort early" else None
        try:
            return await self._read(link, job, fate, rid, wire)
        finally:
            if aborting is not None:
                await aborting

    async def _read(self, link: Link, job: Job, fate: str, rid: str, wire: bytes) -> list[Item] | None:
        status = await link.ask(wire)
        if status != 200:
            check_status(status, (await link.whole()).decode(errors="replace"))
        oracle = self.oracle[job.name]
        items = [Item() for _ in oracle]
        turn, chunks, done = self.random.randrange(1, 12), 0, False
        async for event in link.events():
            if done:
                raise WrongError(f"after [DONE]: {event[:200]!r}")
            if event == b"[DONE]":
                done = True
                continue
            chunk = msgspec.json.decode(event)
            if "error" in chunk:
                check_status(chunk["error"]["code"], chunk["error"]["message"])
            items[chunk.get("index", 0)].add(chunk)
            chunks += 1
            if chunks == turn and fate == "leave":
                for item, wanted in zip(items, oracle, strict=True):
                    check_beginning(job, item, wanted)
                link.hang_up()
                return None
            if chunks == turn and fate == "abort":
                await self._abort(rid)
            if fate == "slow":
                await asyncio.sleep(_SLOWNESS)
        if not done:
            raise WrongError(f"a stream without [DONE], {chunks} chunks")
        return items

    def _judge(self, job: Job, fate: str, items: list[Item], sent: float) -> str:
        for item in items:
            check_failure(item.finish)
        self.ledger.tokens += compare(job, items, self.oracle[job.name])
        if not any(was_aborted(item) for item in items):
            return "answered right"
        if fate in ("abort", "abort early"):
            return "aborted as asked"
        self.ledger.incident("aborted", f"{job.name} ({fate})", sent)
        return "aborted with all others, as asked"

    async def _abort_soon(self, rid: str) -> None:
        await asyncio.sleep(self.random.random() * 0.3)
        await self._abort(rid)

    async def _abort(self, rid: str) -> None:
        """`rid` may be unknown by now, or not known yet: the answer is the same."""
        sent = time.monotonic()
        try:
            status, _, body = await self.ask(Job("abort", "call", "/abort_request", {"rid": rid}))
        except LostConnectionError as error:
            self.ledger.incident("lost", f"/abort_request: {error}", sent)
            return
        if (status, body) != (200, b""):
            self.ledger.violation(f"/abort_request: answered {status}: {body[:200]!r}")


def _check_retry_after(headers: dict[str, str]) -> None:
    if "retry-after" not in headers:
        raise WrongError("a 503 without Retry-After")
