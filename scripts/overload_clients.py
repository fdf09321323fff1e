"""The clients of `scripts.overload`, each kind in a process of its own, so that none measures another's delay.

python -m scripts.overload_clients rush|health|refusals|streams URL OPTIONS: says "ready", begins when a line comes on
stdin, and prints one line of JSON at its end: that of its work (rush, streams) or that of stdin.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import resource
import select
import socket
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec

from engine.bench.errors import BenchError
from engine.bench.http_client import Answer, Connection, Target, parse_url, request_bytes, run

HUNG = 1800.0
PAUSE = 0.02
"""Seconds between two probes."""
_LOOK = 0.005
"""Seconds between two looks at how late this process's own loop is."""
_FULL = b"The request queue is full."


class Seen(msgspec.Struct):
    """What one process has seen.

    answers: by what they were. seconds: of each refusal, of each answer to a probe, or between two events of a stream.
    late: the process's own delays: how much later than it had asked for it woke, which it would take for the server's.
    computed: CPU seconds that the server's frontend has used during each probe: what else it did first.
    """

    answers: dict[str, int] = {}
    seconds: list[float] = []
    late: list[float] = []
    computed: list[float] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=["rush", "health", "refusals", "streams"])
    parser.add_argument("url")
    parser.add_argument("--pid", type=int, default=0, help="of the server's frontend")
    parser.add_argument("--clients", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--prompt-words", type=int, default=20)
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    target = parse_url(options.url)
    print("ready", flush=True)
    sys.stdin.readline()
    match options.role:
        case "health":
            seen = _probe(target, request_bytes(target, "GET", "/health"), options.pid)
        case "refusals":
            # Where there is room after all, it is given up soon.
            body = {"text": "a", "sampling_params": {"max_new_tokens": 1}, "timeout": 0.05}
            seen = _probe(target, request_bytes(target, "POST", "/generate", body), options.pid)
        case "streams":
            seen = run(_together(_steady, target, options))
        case _:
            seen = run(_together(_client, target, options))
    print(msgspec.json.encode(seen).decode(), flush=True)


def _probe(target: Target, wire: bytes, pid: int) -> Seen:
    """Send `wire` on a new connection again and again until stdin ends; of a /generate, time what the full queue
    refuses."""
    seen, answers = Seen(), Counter[str]()
    while True:
        due = perf_counter() + PAUSE
        if select.select([sys.stdin], [], [], PAUSE)[0]:
            seen.answers = dict(answers)
            return seen
        began, used = perf_counter(), _cpu(pid)
        seen.late.append(began - due)
        with socket.create_connection((target.host, target.port), timeout=60) as connection:
            connection.sendall(wire)
            answer = _whole(connection)
        what = answer[9:12].decode()
        if wire.startswith(b"GET") or _FULL in answer:
            seen.seconds.append(perf_counter() - began)
            seen.computed.append(_cpu(pid) - used)
        else:
            what = "not refused by the queue"
        answers[what] += 1


def _cpu(pid: int) -> float:
    """CPU seconds that the main thread of process `pid` has used: psutil tells hundredths only."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def _whole(connection: socket.socket) -> bytes:
    """An answer whose length is declared."""
    answer = b""
    while True:
        head, end, body = answer.partition(b"\r\n\r\n")
        if end:
            lines = head.lower().split(b"\r\n")
            if len(body) >= int(next(line for line in lines if line.startswith(b"content-length:"))[15:]):
                return answer
        data = connection.recv(1 << 16)
        if not data:
            raise ConnectionError(f"the connection ended after {answer!r}")
        answer += data


async def _together(client: Any, target: Target, options: argparse.Namespace) -> Seen:
    """Run all clients at once, and look how late they are because they are so many."""
    seen, answers = Seen(), Counter[str]()
    looking = asyncio.create_task(_look(seen))
    try:
        await asyncio.gather(*(client(target, number, options, seen, answers) for number in range(options.clients)))
    finally:
        looking.cancel()
    seen.answers = dict(answers)
    return seen


async def _look(seen: Seen) -> None:
    while True:
        due = time.perf_counter() + _LOOK
        await asyncio.sleep(_LOOK)
        seen.late.append(perf_counter() - due)


def _body(number: int, options: argparse.Namespace, *, stream: bool) -> dict[str, Any]:
    return {
        "text": f"{number} " + "and on and " * (options.prompt_words // 3),
        "sampling_params": {"max_new_tokens": options.tokens, "temperature": 0.0, "ignore_eos": True},
        "stream": stream,
    }


async def _client(target: Target, number: int, options: argparse.Namespace, seen: Seen, answers: Counter[str]) -> None:
    """One of the rush: every other one asks for a stream."""
    stream = bool(number % 2)
    answer = await _exchange(target, request_bytes(target, "POST", "/generate", _body(number, options, stream=stream)))
    what = answer if isinstance(answer, str) else _what(answer)
    answers[what] += 1
    if isinstance(answer, Answer) and what.startswith("refused"):
        seen.seconds.append(answer.finished - answer.sent)


async def _steady(target: Target, number: int, options: argparse.Namespace, seen: Seen, answers: Counter[str]) -> None:
    """A stream that runs before the rush comes."""
    answer = await _exchange(target, request_bytes(target, "POST", "/generate", _body(number, options, stream=True)))
    answers[answer if isinstance(answer, str) else _what(answer)] += 1
    if isinstance(answer, Answer):
        seen.seconds += [after - before for before, after in pairwise(answer.events)]


async def _exchange(target: Target, wire: bytes) -> Answer | str:
    try:
        connection = await Connection.open(target)
        with contextlib.closing(connection):
            async with asyncio.timeout(HUNG):
                return await connection.exchange(wire, streamed=b'"stream":true' in wire)
    except TimeoutError:
        return "hung"
    except BenchError as error:
        return f"lost: {error}"[:80]


def _what(answer: Answer) -> str:
    if answer.status == 503 or b'"status_code":503' in answer.body:
        return "refused 503"
    if answer.status == 200 and b'"type":"length"' in answer.body:
        return "answered"
    return f"{answer.status} {answer.body[:60]!r}"


if __name__ == "__main__":
    main()
