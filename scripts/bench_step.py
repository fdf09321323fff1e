"""A decode step's budget: microseconds in kernels by op, in the rest of the scheduler, and in the other processes; and
what an idle server uses.

python -m scripts.bench_step [--batch 1,32] [--context 160] [--tokens 64] [--idle 20] [--model PATH] [--dtype bfloat16]

Kernels are timed op by op in this process, on the same threads and instruction set as the server's; the server is then
asked for as many streams over HTTP, and its steps are timed by the wall.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch

from engine.bench.http_client import run
from engine.bench.live_server import LiveServer, running_server
from engine.checkpoints.load_weights import load_weights, open_weights
from engine.checkpoints.locate import locate
from engine.checkpoints.read_config import read_model_config
from engine.kernels.batch import RaggedBatch, offsets
from engine.kernels.choice import open_backend
from engine.kernels.cpu import PlanProgram
from engine.kernels.kv_cache import allocate_kv_cache
from engine.models.registry import build_model
from scripts.bench_pipeline import cpu_seconds, stream_round

REPEATS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", default="1,32")
    parser.add_argument("--context", type=int, default=160)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--idle", type=float, default=20.0)
    parser.add_argument("--model", default=None)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    sizes = [int(size) for size in options.batch.split(",")]
    kernels = {size: kernel_budget(options.model, options.dtype, size, options.context) for size in sizes}
    flags = ("--log-level", "warning", "--dtype", options.dtype)
    with running_server(*flags, model=options.model) as server:
        run(stream_round(server, max(sizes), 8))
        for size in sizes:
            report(size, kernels[size], server_budget(server, size, options.tokens))
        idle = idle_share(server, options.idle)
    print(f"idle for {options.idle:.0f} s: " + ", ".join(f"{name} {share:.3%}" for name, share in idle.items()))
    print(f"idle, the whole tree: {sum(idle.values()):.2%} of a core")


def kernel_budget(path: str | None, dtype_name: str, size: int, context: int) -> dict[str, float]:
    """Microseconds of a step of `size` decodes by kind of op (timed one by one), and "in one call": the step as it is
    run, by the median."""
    source = locate(path)
    config = read_model_config(source)
    dtype: torch.dtype = getattr(torch, dtype_name)
    backend = open_backend("auto", None)
    model = build_model(config, dtype=dtype, backend=backend)
    load_weights(open_weights(source, config), model.places, ignore=model.ignored)
    program: Any = model.program(allocate_kv_cache(config, size * context, dtype, "cpu"))
    if not isinstance(program, PlanProgram):
        raise SystemExit(f"the backend {backend.name} has no plan to look into")
    batch, rows = decodes(size, context, config.vocab_size), np.arange(size)
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        program.run(batch, rows)
        times.append(1e6 * (time.perf_counter() - started))
    program.plan.set_profiling(True)
    program.plan.take_profile()
    for _ in range(REPEATS):
        program.run(batch, rows)
    by_op = {name: spent / REPEATS for name, spent in program.plan.take_profile().items()}
    return {**by_op, "in one call": statistics.median(times)}


def decodes(size: int, context: int, vocabulary: int) -> RaggedBatch:
    """One new token each of `size` sequences of `context` tokens."""
    slots = torch.arange(size * context)
    last = slots.view(size, context)[:, -1]
    return RaggedBatch(
        token_ids=torch.arange(size) % vocabulary,
        positions=torch.full((size,), context - 1),
        slots=last.contiguous(),
        query_starts=tuple(range(size + 1)),
        context_lengths=(context,) * size,
        context_slots=slots,
        context_starts=offsets((context,) * size),
    )


def server_budget(server: LiveServer, size: int, tokens: int) -> dict[str, float]:
    """Microseconds a step by the wall, and of CPU in each process; the prefill of the short prompts is in it."""
    before, started = cpu_seconds(server), time.monotonic()
    run(stream_round(server, size, tokens))
    wall = time.monotonic() - started
    spent = {name: 1e6 * (seconds - before[name]) / tokens for name, seconds in cpu_seconds(server).items()}
    return {"wall": 1e6 * wall / tokens, **spent}


def report(size: int, kernels: dict[str, float], server: dict[str, float]) -> None:
    whole = kernels.pop("in one call")
    parts = ", ".join(f"{name} {spent:.0f}" for name, spent in sorted(kernels.items(), key=lambda item: -item[1]))
    others = ", ".join(f"{name} {spent:.0f}" for name, spent in server.items() if name != "wall")
    print(f"batch {size}: kernels {whole:.0f} µs in one call; op by op: {parts}")
    print(f"  over HTTP: {server['wall']:.0f} µs a step, so {server['wall'] - whole:.0f} outside the kernels")
    print(f"  CPU of each process, µs a step: {others}", flush=True)


def idle_share(server: LiveServer, seconds: float) -> dict[str, float]:
    """What share of a core each process uses while nothing is asked."""
    time.sleep(1.0)  # what follows a request is no idleness yet
    before = cpu_seconds(server)
    time.sleep(seconds)
    return {name: (spent - before[name]) / seconds for name, spent in cpu_seconds(server).items()}


if __name__ == "__main__":
    main()
