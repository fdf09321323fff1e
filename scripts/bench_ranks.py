"""What dividing a model costs: a decode step on two ranks of one thread against one rank of two threads, in turn; and
how long two processes take to add up 4 KB.

python -m scripts.bench_ranks [--shapes qwen2-0.5b,smollm2-135m] [--batch 1,16] [--tokens 48] [--rounds 5]

Steps are timed by a client: the medians of the times between the chunks of a stream.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np

from engine.bench.live_server import LiveServer, running_server
from engine.kernels import _cpu
from engine.kernels.cores import physical_cores, share_of
from scripts.random_checkpoint import SHAPES, write_checkpoint

REDUCTIONS = 5000
FLOATS = 1024
THREADS = "2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="qwen2-0.5b,smollm2-135m", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--batch", default="1,16")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--join", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.join is not None:
        reductions(options.join, 1)
        return
    print(f"all-reduce of {4 * FLOATS} bytes between two processes: {all_reduce():.1f} µs (median)", flush=True)
    for shape in options.shapes.split(","):
        with tempfile.TemporaryDirectory(prefix="tokenmill-ranks-") as folder, ExitStack() as stack:
            write_checkpoint(Path(folder) / shape, SHAPES[shape], 0)
            servers = [
                stack.enter_context(
                    running_server(
                        "--tp-size", str(ranks), "--cpu-threads", THREADS, "--log-level", "warning",
                        "--max-total-tokens", "20000", model=Path(folder) / shape,
                    )
                )
                for ranks in (1, 2)
            ]  # fmt: skip
            for batch in map(int, options.batch.split(",")):
                compare(shape, servers, batch, options.tokens, options.rounds)


def compare(shape: str, servers: list[LiveServer], batch: int, tokens: int, rounds: int) -> None:
    times: list[list[float]] = [[], []]
    for number in range(rounds + 1):
        for server, found in zip(servers, times, strict=True):
            gaps = step_times(server, batch, tokens)
            if number:  # the first round warms up
                found.append(statistics.median(gaps))
    one, two = map(statistics.median, times)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    print(
        f"{shape}, batch {batch}: 1 rank of 2 threads {1e3 * one:.2f} ms, 2 ranks of 1 thread {1e3 * two:.2f} ms, "
        f"ratio {two / one:.2f} ({min(ratios):.2f} to {max(ratios):.2f} in the rounds)",
        flush=True,
    )


def step_times(server: LiveServer, batch: int, tokens: int) -> list[float]:
    """Seconds between the tokens of the first of `batch` requests."""
    body = {
        "input_ids": [[7 + number, 11, 13, 17] for number in range(batch)], "stream": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
    }  # fmt: skip
    at: list[float] = []
    with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=300, trust_env=False) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {") and json.loads(line.removeprefix("data: ")).get("index", 0) == 0:
                at.append(time.perf_counter())
    return np.diff(at)[2:].tolist()


def all_reduce() -> float:
    """Median microseconds, as rank 0 sees it."""
    descriptor = os.memfd_create("bench")
    os.posix_fallocate(descriptor, 0, 4096 + 4 * 4 * FLOATS)
    with subprocess.Popen(
        [sys.executable, "-m", "scripts.bench_ranks", "--join", path(os.getpid(), descriptor)]
    ) as other:
        kept = os.sched_getaffinity(0)
        times = reductions(path(os.getpid(), descriptor), 0)
        os.sched_setaffinity(0, kept)
        other.wait(60)
    os.close(descriptor)
    return 1e6 * statistics.median(times)


def path(pid: int, descriptor: int) -> str:
    return f"/proc/{pid}/fd/{descriptor}"


def reductions(where: str, rank: int) -> list[float]:
    os.sched_setaffinity(0, share_of(physical_cores(), 2, rank, 2)[0])
    exchange = _cpu.SharedExchange(where, rank, 2, 4 * FLOATS, 60.0, False)
    values, times = np.ones(FLOATS, np.float32), []
    for _ in range(REDUCTIONS):
        started = time.perf_counter()
        exchange.all_reduce(values)
        times.append(time.perf_counter() - started)
        values.fill(1.0)
    return times


if __name__ == "__main__":
    main()
