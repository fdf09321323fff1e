"""Replicas of Tokenmill under Ray Serve: each Ray replica owns a whole server, and passes HTTP on to it.

serve run scripts.ray.serve_tokenmill:app flags="--model-path Qwen/Qwen2.5-0.5B-Instruct" replicas=2 cpus=8

Ray Serve chooses replicas by their queues, not by prefixes; where shared prefixes matter, sglang-router is the better
gateway (docs/scaling.md).
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
from ray import serve
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from engine.launcher.children import child_environment

DRAIN_SECONDS = 60.0
"""What requests get that run when a replica is to end; Ray waits for that long, and so does the server."""
END_SECONDS = 10.0
"""Beyond a drain, for the processes to end."""
MOST_REQUESTS = 256
"""Requests that Ray has a replica answer at once; beyond it they wait in Ray's queue, where no prefix is seen."""

_URL = re.compile(rb"^Tokenmill serves \S+ on (http://\S+)$", re.MULTILINE)
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "host", "content-length"}
"""Headers that belong to one connection (RFC 9110, 7.6.1), and the length, which is stated anew."""


@serve.deployment(
    name="tokenmill",
    max_ongoing_requests=MOST_REQUESTS,
    graceful_shutdown_timeout_s=DRAIN_SECONDS + END_SECONDS,
    health_check_period_s=5,
    health_check_timeout_s=30,
)
class Tokenmill:
    """A server on a free port of the loopback interface, from the replica's start to its end.

    flags: of `tokenmill serve`. cpus: processors of the server, of which the n-th replica of a machine takes the n-th
    share; None: all that Ray's worker may use.
    """

    async def __init__(self, flags: list[str], cpus: int | None = None) -> None:  # type: ignore[misc]
        """Returns when the server is ready: Ray sends nothing before, and takes any time for a start. Raises
        RuntimeError where it ends instead."""
        words = [sys.executable, "-m", "engine", "serve", "--drain-timeout", f"{DRAIN_SECONDS:g}", *flags]
        # Ray says OMP_NUM_THREADS=1 to its workers; the server sees to its threads by itself.
        environment = {name: value for name, value in child_environment().items() if name != "OMP_NUM_THREADS"}
        self._server = subprocess.Popen(  # noqa: ASYNC220
            [*words, "--port", "0"], env=environment, stdout=subprocess.PIPE
        )
        os.sched_setaffinity(self._server.pid, _share(cpus))  # long before it counts its processors
        url = await asyncio.to_thread(self._said_url)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=MOST_REQUESTS)
        self._http = httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False)

    def _said_url(self) -> str:
        assert self._server.stdout is not None
        for line in self._server.stdout:
            if found := _URL.search(line):
                return found[1].decode()
        raise RuntimeError(f"the server ended with exit code {self._server.wait()} before it was ready; see its log")

    async def __call__(self, request: Request) -> Response:
        """What the server answers, as it comes."""
        http = self._http
        passed = http.build_request(
            request.method,
            httpx.URL(path=request.url.path, query=request.url.query.encode()),
            headers=[(name, value) for name, value in request.headers.items() if name not in _HOP_BY_HOP],
            content=await request.body(),
        )
        try:
            answer = await http.send(passed, stream=True)
        except httpx.TransportError as error:
            return Response(f"the replica's server does not answer: {error!r}", 503, {"Retry-After": "1"})
        headers = {name: value for name, value in answer.headers.items() if name not in _HOP_BY_HOP}
        return StreamingResponse(_passed(answer), answer.status_code, headers, background=BackgroundTask(answer.aclose))

    async def check_health(self) -> None:
        """Raises where Ray is to replace this replica: its server has ended, or does not get on."""
        if self._server.poll() is not None:
            raise RuntimeError(f"the server has ended with exit code {self._server.returncode}")
        told = await self._http.get("/health", timeout=25)
        if told.status_code != 200:
            raise RuntimeError(f"the server's /health is {told.status_code}")

    def __del__(self) -> None:
        """Drain: Ray calls this when the replica's own requests have ended, or their time has."""
        server = getattr(self, "_server", None)
        if server is None:
            return
        server.terminate()
        try:
            server.wait(DRAIN_SECONDS + END_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


async def _passed(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The body, undecoded. Ends the server's work where the client goes away."""
    try:
        async for piece in answer.aiter_raw():
            yield piece
    finally:
        await answer.aclose()


def _share(cpus: int | None) -> list[int]:
    """Processors of the `local_rank`-th replica of this machine; all there are where that cannot be said."""
    allowed = sorted(os.sched_getaffinity(0))
    if cpus is None:
        return allowed
    first = serve.get_replica_context().rank.local_rank * cpus
    return allowed[first : first + cpus] or allowed


def app(args: dict[str, str]) -> Any:
    """For `serve run` and Serve's config files. flags: of `tokenmill serve`, as for a shell; replicas: how many; cpus:
    processors of each, which Ray keeps for it."""
    unknown = sorted(args.keys() - {"flags", "replicas", "cpus"})
    if unknown:
        raise ValueError(f"argument {unknown[0]!r} is not known; known are flags, replicas, cpus")
    cpus = int(args["cpus"]) if "cpus" in args else None
    options = {} if cpus is None else {"num_cpus": cpus}
    sized = Tokenmill.options(  # type: ignore[attr-defined]
        num_replicas=int(args.get("replicas", "1")), ray_actor_options=options
    )
    return sized.bind(shlex.split(args.get("flags", "")), cpus)
