"""Streams that run while processes are killed under them, and what they must come to."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil

from engine.bench.live_server import LiveServer
from engine.config import faults

Json = dict[str, Any]
Drive = Callable[[httpx.AsyncClient], Awaitable[Any]]
Way = signal.Signals | Literal["exception"]
"""How a process comes to its end."""

MODULES = {
    "tokenizer": "tokenizer_proc",
    "scheduler": "scheduler_proc",
    "detokenizer": "detokenizer_proc",
    "frontend": "http_frontend",
}
LISTS = ("input_token_logprobs", "input_top_logprobs", "output_token_logprobs", "output_top_logprobs")
PATIENCE = 120.0
STREAMS = 32


def pid_of(server: LiveServer, process: str) -> int | None:
    """The pid of the process that plays `process` now."""
    for child in psutil.Process(server.launcher.pid).children():
        try:
            words = child.cmdline()
            running = child.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            continue
        if running and (MODULES[process] in words or (words and words[0].startswith(f"tokenmill: {process}"))):
            return child.pid
    return None


def kill(server: LiveServer, process: str, number: signal.Signals) -> int:
    pid = pid_of(server, process)
    assert pid is not None, f"there is no {process}\n{server.log()}"
    os.kill(pid, number)
    return pid


async def another(server: LiveServer, process: str, pid: int) -> None:
    """Wait until another process than `pid` plays `process`."""
    await until(lambda: pid_of(server, process) not in (pid, None), server)


@dataclass
class Target:
    """A live server whose processes are to end, and how. thrown: folder of the files that have a loop raise."""

    live: LiveServer
    http: httpx.AsyncClient
    thrown: Path

    async def end(self, process: str, way: Way) -> int:
        """End who plays `process`; returns the pid. An exception has been raised when this returns."""
        if not isinstance(way, str):
            return kill(self.live, process, way)
        pid = pid_of(self.live, process)
        assert pid is not None, f"there is no {process}\n{self.live.log()}"
        file = self.thrown / process
        file.touch()
        deadline = time.monotonic() + PATIENCE
        while file.exists():
            assert time.monotonic() < deadline, self.live.log()
            with contextlib.suppress(httpx.TransportError):  # goes round the ring, so that every loop turns at once
                await self.http.get("/server_info", timeout=0.05)
        return pid

    async def end_for_good(self, process: str, way: Way) -> int:
        """`end`, and wait until the frontend has gone on with another (which must not be its own)."""
        log_size = self.live.log_path.stat().st_size
        pid = await self.end(process, way)
        await self.logged("whole again", log_size)
        return pid

    async def slow(self, seconds: float | None) -> None:
        """Have this scheduler sleep before each step: the tiny model would end all requests while a busy machine still
        sees to the end of a process."""
        (await self.http.post("/slow_down", json={"forward_sleep_time": seconds})).raise_for_status()

    async def another(self, process: str, pid: int) -> None:
        """Wait until another process than `pid` plays `process`."""
        await another(self.live, process, pid)

    async def logged(self, words: str, since: int) -> None:
        """Wait until `words` are in the log, behind its first `since` bytes."""
        await until(lambda: words in log_since(self.live, since), self.live)

    async def has_requests(self, count: int) -> None:
        """Wait until the scheduler has taken in so many requests."""
        deadline = time.monotonic() + PATIENCE
        while True:
            state = (await self.http.get("/server_info")).json()["internal_states"][0]
            if state["num_running_reqs"] + state["num_waiting_reqs"] >= count:
                return
            assert time.monotonic() < deadline, state


def in_loops(thrown: Path) -> str:
    """What TOKENMILL_FAULTS is to be for `Target.end` with an exception."""
    there = [{"where": "loop", "process": name, "file": str(thrown / name), "what": "raise"} for name in MODULES]
    text = json.dumps(there)
    faults.arm(text)  # checks it
    faults.arm(None)
    return text


def log_since(server: LiveServer, size: int) -> str:
    """The log behind its first `size` bytes."""
    with server.log_path.open("rb") as file:
        file.seek(size)
        return file.read().decode(errors="replace")


async def until(condition: Callable[[], bool], server: LiveServer) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, server.log()
        await asyncio.sleep(0.01)


async def whole(http: httpx.AsyncClient) -> None:
    """Wait until `/health` is 200."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if (await http.get("/health")).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def drive(server: LiveServer, work: Drive) -> Any:
    async def run() -> Any:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits, trust_env=False) as http:
            await whole(http)
            return await work(http)

    return asyncio.run(run())


def decodes(tokens: int) -> list[Json]:
    """Requests of all kinds: greedy and sampled, with penalties, stops, logprobs, in one piece and in samples."""
    source = random.Random(11)
    shared = [source.randrange(3, 400) for _ in range(30)]
    bodies = []
    for number in range(STREAMS):
        sampling: Json = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
        body: Json = {"input_ids": shared[: number % 3 * 10] + [source.randrange(3, 400) for _ in range(20)]}
        if number % 2:
            sampling |= {"temperature": 1.0, "sampling_seed": number}
        if number % 5 == 1:
            sampling |= {"frequency_penalty": 0.5, "presence_penalty": 0.3, "repetition_penalty": 1.1}
        if number % 7 == 2:
            sampling |= {"stop": ["never seen in this text"], "stop_regex": ["[0-9]{40}"]}
        if number % 6 == 3:
            body |= {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
        if number % 11 == 4:
            sampling |= {"min_new_tokens": tokens // 2}
        if number % 8 == 5:
            sampling |= {"regex": "[a-z ]{5000}"}
        bodies.append(body | {"sampling_params": sampling})
    return bodies


def prefills(tokens: int, length: int = 2500) -> list[Json]:
    """Long prompts, each of its own."""
    source = random.Random(time.monotonic_ns())
    return [
        {
            "input_ids": [source.randrange(3, 400) for _ in range(length)],
            "sampling_params": {"max_new_tokens": tokens, "temperature": number % 2, "ignore_eos": True}
            | {"sampling_seed": number},
        }
        for number in range(4)
    ]


@dataclass
class Stream:
    """One stream of deltas (--incremental-streaming-output) as its client has seen it: what it comes to so far.

    at: time.monotonic() of its start and of each chunk.
    """

    body: Json
    text: str = ""
    ids: list[int] = field(default_factory=list)
    lists: Json = field(default_factory=dict)
    meta: Json = field(default_factory=dict)
    at: list[float] = field(default_factory=list)
    ended: bool = False

    async def run(self, http: httpx.AsyncClient) -> Stream:
        self.at.append(time.monotonic())
        async with http.stream("POST", "/generate", json=self.body | {"stream": True}) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    self.at.append(time.monotonic())
                    chunk = json.loads(line.removeprefix("data: "))
                    assert "error" not in chunk, chunk
                    self._add(chunk)
        self.ended = True
        return self

    def _add(self, chunk: Json) -> None:
        self.text += chunk["text"]
        self.ids += chunk["output_ids"]
        self.meta = chunk["meta_info"]
        assert self.meta["completion_tokens"] == len(self.ids)
        for name in LISTS:
            came = self.meta.get(name) or []
            if name.startswith("output"):
                self.lists.setdefault(name, []).extend(came)
            elif came:
                assert self.lists.setdefault(name, came) == came
        if self.body.get("return_logprob"):
            assert len(self.lists["output_token_logprobs"]) == len(self.ids)

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def gap(self) -> float:
        """Seconds of the longest silence."""
        return max((after - before for before, after in itertools.pairwise(self.at)), default=0.0)

    def answer(self) -> Json:
        """What must not depend on what happened on the way."""
        names = ("prompt_tokens", "completion_tokens", "finish_reason")
        return {"text": self.text, "ids": self.ids} | {name: self.meta[name] for name in names} | self.lists


async def undisturbed(http: httpx.AsyncClient, bodies: list[Json]) -> list[Json]:
    return [stream.answer() for stream in await asyncio.gather(*(Stream(body).run(http) for body in bodies))]


class Running:
    """Streams of `bodies` on their way."""

    def __init__(self, http: httpx.AsyncClient, bodies: list[Json]) -> None:
        self.streams = [Stream(body) for body in bodies]
        self._task = asyncio.gather(*(stream.run(http) for stream in self.streams))

    async def decoding(self, tokens: int) -> None:
        """Wait until each stream has so many tokens."""
        while any(stream.tokens < tokens for stream in self.streams):
            assert not self._task.done() or self._task.exception() is None
            await asyncio.sleep(0.005)

    async def progress(self, streams: int = 1, tokens: int = 1) -> None:
        """Wait until so many streams have so many new tokens each, or have ended."""
        before = [stream.tokens for stream in self.streams]

        def going_on() -> int:
            pairs = zip(self.streams, before, strict=True)
            return sum(stream.ended or stream.tokens >= had + tokens for stream, had in pairs)

        while going_on() < streams and not self._task.done():  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    async def answers(self) -> list[Json]:
        await asyncio.wait_for(self._task, PATIENCE)
        return [stream.answer() for stream in self.streams]

    @property
    def pause(self) -> float:
        return max(stream.gap for stream in self.streams)
