"""A profile as a file in Chrome's trace-event format, which Perfetto (ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

_TRACK = 1


@dataclass(slots=True)
class Step:
    """One step; times are microseconds since the profile began.

    marks: name and end of each phase, in order; the first begins where the step does.
    kernels: microseconds by kind of op within the phase "forward".
    """

    number: int
    started: float
    marks: list[tuple[str, float]]
    requests: int
    prefill_tokens: int
    decode_tokens: int
    kernels: dict[str, float]
    running: int
    waiting: int
    used: int
    cached: int
    free: int

    @property
    def ended(self) -> float:
        return self.marks[-1][1]


def write_trace(path: Path, steps: list[Step], about: dict[str, Any]) -> None:
    """Write `steps` to `path`, gzipped; `about` goes beside them. The file must not exist. Raises OSError."""
    trace = {"displayTimeUnit": "ms", "otherData": about, "traceEvents": list(events(steps))}
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=5) as file:
        file.write(msgspec.json.encode(trace))


def events(steps: list[Step]) -> Iterator[dict[str, Any]]:
    """A slice a step, in it one a phase, in "forward" one a kind of op; counters of the queue and of the pool."""
    pid = os.getpid()
    yield {"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": "tokenmill scheduler tp0"}}
    yield {"name": "thread_name", "ph": "M", "pid": pid, "tid": _TRACK, "args": {"name": "steps"}}
    for step in steps:
        numbers = {
            "step": step.number,
            "requests": step.requests,
            "prefill_tokens": step.prefill_tokens,
            "decode_tokens": step.decode_tokens,
        }
        kind = "prefill" if step.prefill_tokens else "decode"
        yield _slice(pid, f"step ({kind})", step.started, step.ended, numbers)
        began = step.started
        for name, end in step.marks:
            yield _slice(pid, name, began, end, {})
            if name == "forward":
                yield from _kernels(pid, step.kernels, began, end)
            began = end
        yield _counter(pid, "requests", step.started, {"running": step.running, "waiting": step.waiting})
        pool = {"used": step.used, "cached": step.cached, "free": step.free}
        yield _counter(pid, "KV pool (tokens)", step.started, pool)


def _kernels(pid: int, kernels: dict[str, float], began: float, end: float) -> Iterator[dict[str, Any]]:
    """The kinds of ops end to end, longest first: how long each took in all, not when."""
    total = sum(kernels.values())
    scale = min(1.0, (end - began) / total) if total else 1.0
    for name, spent in sorted(kernels.items(), key=lambda item: -item[1]):
        stop = min(began + spent * scale, end)
        yield _slice(pid, name, began, stop, {"microseconds": round(spent, 1)})
        began = stop


def _slice(pid: int, name: str, began: float, end: float, args: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name, "cat": "step", "ph": "X", "pid": pid, "tid": _TRACK, "ts": began, "dur": end - began, "args": args
    }  # fmt: skip


def _counter(pid: int, name: str, at: float, values: dict[str, int]) -> dict[str, Any]:
    return {"name": name, "ph": "C", "pid": pid, "tid": 0, "ts": at, "args": values}
