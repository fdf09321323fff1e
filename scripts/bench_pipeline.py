"""What the pipeline costs: CPU time per streamed token of every process but the scheduler.

python -m scripts.bench_pipeline [--streams 32] [--tokens 128] [--incremental] [--model PATH] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

from engine.bench.http_client import Connection, parse_url, read_generation, request_bytes, run
from engine.bench.live_server import LiveServer, running_server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--incremental", action="store_true")
    parser.add_argument("--model", default=None)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    flags = ["--incremental-streaming-output"] if options.incremental else []
    with running_server("--log-level", "warning", "--dtype", options.dtype, *flags, model=options.model) as server:
        run(stream_round(server, options.streams, 8))
        for _ in range(options.rounds):
            before = cpu_seconds(server)
            started = time.monotonic()
            run(stream_round(server, options.streams, options.tokens))
            wall = time.monotonic() - started
            count = options.streams * options.tokens
            spent = {name: 1e6 * (seconds - before[name]) / count for name, seconds in cpu_seconds(server).items()}
            outside = sum(cost for name, cost in spent.items() if not name.startswith("scheduler"))
            parts = ", ".join(f"{name} {cost:.1f}" for name, cost in spent.items())
            print(f"{count / wall:.0f} tok/s; CPU µs per streamed token outside the scheduler: {outside:.1f} ({parts})")


async def stream_round(server: LiveServer, streams: int, tokens: int) -> None:
    target = parse_url(server.url)

    async def stream(number: int) -> None:
        sampling = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0.8, "sampling_seed": number}
        body = {"text": f"Story number {number}: once upon a time", "stream": True, "sampling_params": sampling}
        connection = await Connection.open(target)
        answer = await connection.exchange(request_bytes(target, "POST", "/generate", body), streamed=True)
        connection.close()
        read_generation(answer, streamed=True, tokens=tokens)

    await asyncio.gather(*map(stream, range(streams)))


def cpu_seconds(server: LiveServer) -> dict[str, float]:
    """Seconds that each process has spent on a CPU, by the kernel's run-time clock (ticks are too coarse)."""
    return {title: sum(_thread_seconds(pid)) for title, pid in server.pids.items()}


def _thread_seconds(pid: int) -> Iterator[float]:
    for schedstat in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        yield int(schedstat.read_text().split()[0]) / 1e9


if __name__ == "__main__":
    main()
