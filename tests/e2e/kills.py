"""Streams that run while processes are killed under them, and what they must come to."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from engine.bench.live_server import LiveServer

Json = dict[str, Any]
Drive = Callable[[httpx.AsyncClient], Awaitable[Any]]

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
    deadline = time.monotonic() + PATIENCE
    while pid_of(server, process) in (pid, None):
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

    async def progress(self) -> None:
        """Wait until some stream has a new token."""
        before = sum(stream.tokens for stream in self.streams)
        await asyncio.sleep(0.05)
        while sum(stream.tokens for stream in self.streams) == before and not self._task.done():  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    async def answers(self) -> list[Json]:
        await asyncio.wait_for(self._task, PATIENCE)
        return [stream.answer() for stream in self.streams]

    @property
    def pause(self) -> float:
        return max(stream.gap for stream in self.streams)
