"""The real gateway `sglang-router` in front of live replicas: started as a user starts it, and always ended."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

Json = dict[str, Any]

PATIENCE = 90.0
"""Seconds that anything may take on a machine that does other things as well."""
ATTEMPTS = 3
"""Starts of a router: another program may take the port between its choice and its use."""
QUICK = (
    "--health-check-interval-secs", "1", "--health-failure-threshold", "1", "--health-success-threshold", "1",
    "--cb-timeout-duration-secs", "1", "--worker-startup-check-interval", "1",
)  # fmt: skip
"""What the router sees after minutes by default, it is to see within seconds."""
OF_THE_MOMENT = ("id", "cached_tokens", "cached_tokens_details")
"""What `meta_info` tells of one call and not of its answer, beside times."""


@dataclass(frozen=True)
class Router:
    """A router that has its workers. http: its client."""

    url: str
    http: httpx.Client
    log_path: Path

    def workers(self) -> list[Json]:
        listed: list[Json] = self.http.get("/workers").raise_for_status().json()["workers"]
        return listed

    def healthy(self) -> set[str]:
        """URLs of the workers that the router would send a request to."""
        return {worker["url"] for worker in self.workers() if worker["is_healthy"]}

    def wait_for(self, *urls: str) -> None:
        """Wait until exactly these workers are healthy."""
        deadline = time.monotonic() + PATIENCE
        while (found := self.healthy()) != set(urls):
            assert time.monotonic() < deadline, f"{found}\n{self.log_path.read_text(errors='replace')}"
            time.sleep(0.1)


@contextmanager
def running_router(*workers: str, flags: tuple[str, ...] = (), key: str | None = None) -> Iterator[Router]:
    """Run `python -m sglang_router.launch_router` in front of `workers`, until the block ends. key: of all."""
    with tempfile.TemporaryDirectory(prefix="tokenmill-router-") as folder:
        log_path = Path(folder) / "log"
        for attempt in range(1, ATTEMPTS + 1):
            port, metrics_port = free_port(), free_port()
            words = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics_port), *flags]
            if key is not None:
                words += ["--api-key", key]
            if workers:
                words += ["--worker-urls", *workers]
            with log_path.open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "sglang_router.launch_router", *words],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                )  # fmt: skip
            try:
                headers = {} if key is None else {"Authorization": f"Bearer {key}"}
                url = f"http://127.0.0.1:{port}"
                with httpx.Client(base_url=url, headers=headers, timeout=PATIENCE, trust_env=False) as http:
                    router = Router(str(http.base_url), http, log_path)
                    if not _listens(router, process) and attempt < ATTEMPTS:
                        continue
                    router.wait_for(*workers)
                    yield router
                return
            finally:
                process.kill()
                process.wait()


def _listens(router: Router, process: subprocess.Popen[bytes]) -> bool:
    """Whether it has come to answer; False when it has ended instead."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None:
        try:
            return router.http.get("/liveness").is_success
        except httpx.TransportError:
            assert time.monotonic() < deadline, router.log_path.read_text(errors="replace")
            time.sleep(0.05)
    return False


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def lasting(answer: Any) -> Any:
    """An answer, or a list of them, without what is true of one call only."""
    if isinstance(answer, list):
        return [lasting(item) for item in answer]
    told = answer["meta_info"].items()
    meta = {name: value for name, value in told if name not in OF_THE_MOMENT and not isinstance(value, float)}
    return {**answer, "meta_info": meta}


@dataclass
class Told:
    """What clients were told that was not the answer: an HTTP status, or the name of what broke off."""

    refusals: list[str]

    async def ask(self, http: httpx.AsyncClient, body: Json) -> Json:
        """The answer to `body`; whatever is not a whole answer is noted, and asked again."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                found = await (_streamed if body.get("stream") else _plain)(http, body)
                return lasting(found)
            except httpx.HTTPStatusError as error:
                self.refusals.append(f"HTTP {error.response.status_code}")
            except (httpx.TransportError, CutOffError) as error:
                self.refusals.append(type(error).__name__)
            assert time.monotonic() < deadline, self.refusals
            await asyncio.sleep(0.05)


class CutOffError(Exception):
    """A stream ended before its `[DONE]`, or with an event that says that it was broken off."""


async def _plain(http: httpx.AsyncClient, body: Json) -> Json:
    answer = await http.post("/generate", json=body)
    return answer.raise_for_status().json()


async def _streamed(http: httpx.AsyncClient, body: Json) -> Json:
    """The last chunk of a stream, which holds all that came before."""
    last: Json = {}
    async with http.stream("POST", "/generate", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return last
            if line:
                last = json.loads(line.removeprefix("data: "))
                if (last["meta_info"]["finish_reason"] or {}).get("type") == "abort":
                    break
    raise CutOffError(last)


def drive(url: str, work: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    """Run `work` with a client of `url`."""

    async def main() -> Any:
        limits = httpx.Limits(max_connections=128)
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits, trust_env=False) as http:
            return await work(http)

    return asyncio.run(main())
