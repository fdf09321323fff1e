"""Many clients at once against a server of default limits: is everyone answered or refused, and how is health?

python -m scripts.overload [--clients 2000] [--tokens 8] [--prompt-words 20] [-- FLAGS OF THE SERVER]

Every client opens a connection of its own and asks for one completion, every other one as a stream; all begin at the
same moment. Meanwhile /health is asked again and again, and the memory of the process tree is read. Exits with 1 when a
client has hung or an answer is neither a completion nor a refusal.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import sys
from collections import Counter
from dataclasses import dataclass, field
from time import perf_counter

import psutil

from engine.bench.errors import BenchError
from engine.bench.http_client import Answer, Connection, Target, parse_url, request_bytes
from engine.bench.live_server import LiveServer, running_server

_HEALTH_PAUSE = 0.05
_HUNG = 1800.0


@dataclass
class Seen:
    """answers: by what they were. refusals, health: seconds that each took. unhealthy: health answers beside 200.
    memory: most bytes of the tree."""

    answers: Counter[str] = field(default_factory=Counter)
    refusals: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    unhealthy: Counter[int] = field(default_factory=Counter)
    memory: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Overload a server and count what becomes of its clients.")
    parser.add_argument("--clients", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--prompt-words", type=int, default=20)
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:at])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with running_server(*words[at + 1 :]) as server:
        idle = _memory(server)
        began = perf_counter()
        seen = asyncio.run(_overload(server, options))
        seconds = perf_counter() - began
        left = {title: round(psutil.Process(pid).memory_info().rss / 1e6) for title, pid in server.pids.items()}
    print(f"{options.clients} clients, {seconds:.1f} s: {dict(seen.answers)}")
    print(f"refused within: {_spread(seen.refusals)}")
    print(f"/health: {_spread(seen.health)}; not 200: {dict(seen.unhealthy)}")
    print(f"memory of the tree: {idle / 1e6:.0f} MB idle, {seen.memory / 1e6:.0f} MB at most; MB after: {left}")
    good = sum(count for what, count in seen.answers.items() if what in ("answered", "refused 503"))
    sys.exit(0 if good == options.clients else 1)


async def _overload(server: LiveServer, options: argparse.Namespace) -> Seen:
    seen, target = Seen(), parse_url(server.url)
    watcher = asyncio.create_task(_watch(server, target, seen))
    clients = [_client(target, number, options, seen) for number in range(options.clients)]
    try:
        await asyncio.gather(*clients)
    finally:
        watcher.cancel()
    return seen


async def _client(target: Target, number: int, options: argparse.Namespace, seen: Seen) -> None:
    stream = bool(number % 2)
    body = {
        "text": f"{number} " + "and on and " * (options.prompt_words // 3),
        "sampling_params": {"max_new_tokens": options.tokens, "temperature": 0.0, "ignore_eos": True},
        "stream": stream,
    }
    wire = request_bytes(target, "POST", "/generate", body)
    try:
        connection = await Connection.open(target)
        async with asyncio.timeout(_HUNG):
            answer = await connection.exchange(wire, streamed=stream)
    except TimeoutError:
        seen.answers["hung"] += 1
        return
    except BenchError as error:
        seen.answers[f"lost: {error}"[:80]] += 1
        return
    what = _what(answer)
    seen.answers[what] += 1
    if what.startswith("refused"):
        seen.refusals.append(answer.finished - answer.sent)


def _what(answer: Answer) -> str:
    if answer.status == 503 or b'"status_code":503' in answer.body:
        return "refused 503"
    if answer.status == 200 and b'"type":"length"' in answer.body:
        return "answered"
    return f"{answer.status} {answer.body[:60]!r}"


async def _watch(server: LiveServer, target: Target, seen: Seen) -> None:
    wire = request_bytes(target, "GET", "/health")
    while True:
        began = perf_counter()
        connection = await Connection.open(target)
        answer = await connection.exchange(wire, streamed=False)
        connection.close()
        seen.health.append(perf_counter() - began)
        if answer.status != 200:
            seen.unhealthy[answer.status] += 1
        seen.memory = max(seen.memory, _memory(server))
        await asyncio.sleep(_HEALTH_PAUSE)


def _memory(server: LiveServer) -> int:
    return sum(psutil.Process(pid).memory_info().rss for pid in server.pids.values())


def _spread(seconds: list[float]) -> str:
    if not seconds:
        return "none"
    ordered = sorted(seconds)
    p50, p99 = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return f"{len(ordered)} times, p50 {1000 * p50:.0f} ms, p99 {1000 * p99:.0f} ms, worst {1000 * ordered[-1]:.0f} ms"


if __name__ == "__main__":
    main()
