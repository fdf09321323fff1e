"""Profiles of the step loop: what is recorded, when it begins and ends, and the file that Perfetto reads."""

from __future__ import annotations

import gzip
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from simulation import Sent, admit, run_to_end, simulated_scheduler

from engine.wire.operation import Profile, Profiled, SlowDown
from scheduler_proc import profiler
from scheduler_proc.profiler import NOT_RUNNING, RUNNING
from scheduler_proc.scheduler import Scheduler


def started(key: int, folder: Path, **fields: Any) -> Profile:
    return Profile(key=key, action="start", folder=str(folder), name="p", **fields)


def answered(scheduler: Scheduler, sent: Sent, key: int) -> Profiled:
    """The answer to message `key`, once the loop has sent it."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        scheduler.turn()
        for message in sent.others:
            if isinstance(message, Profiled) and message.key == key:
                return message
        time.sleep(0.005)
    raise AssertionError(f"message {key} was not answered")


def read(path: str | None) -> dict[str, Any]:
    assert path is not None
    return json.loads(gzip.decompress(Path(path).read_bytes()))


def slices(trace: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X" and event["name"].startswith(name)]


def within(inner: dict[str, Any], outer: dict[str, Any]) -> bool:
    ends = inner["ts"] + inner["dur"], outer["ts"] + outer["dur"]
    return outer["ts"] - 1e-6 <= inner["ts"] and ends[0] <= ends[1] + 1e-6


def test_steps_phases_and_kernels_nest(tmp_path: Path) -> None:
    scheduler, sent, model = simulated_scheduler(300)
    scheduler.handle(admit(0, list(range(1, 21)), new=3))
    run_to_end(scheduler)  # before the profile: not in it
    scheduler.handle(started(1, tmp_path))
    assert answered(scheduler, sent, 1) == Profiled(1)
    for key in (2, 3):
        scheduler.handle(admit(key, [key, *range(1, 30)], new=5))
    steps = 0
    while scheduler.requests:
        scheduler.step()
        steps += 1
    assert model.profiled
    scheduler.handle(Profile(key=4, action="stop"))
    done = answered(scheduler, sent, 4)
    assert done.error is None and not model.profiled and not scheduler.operation.busy
    assert done.path == str(tmp_path / "p-TP-0.trace.json.gz")
    trace = read(done.path)
    whole = slices(trace, "step")
    assert len(whole) == steps == trace["otherData"]["steps"]
    tokens = sum(one["args"]["prefill_tokens"] + one["args"]["decode_tokens"] for one in whole)
    assert tokens == 2 * 30 + 2 * 4  # the last token of each is not computed
    for name in ("plan", "forward", "sample", "emit"):
        parts = slices(trace, name)
        assert len(parts) == steps and all(map(within, parts, whole))
    for kernel in ("linear", "attention"):
        assert all(map(within, slices(trace, kernel), slices(trace, "forward")))
    assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-6 for a, b in pairwise(whole))
    counters = {event["name"] for event in trace["traceEvents"] if event["ph"] == "C"}
    assert counters == {"requests", "KV pool (tokens)"}


def test_a_profile_of_some_steps_ends_itself(tmp_path: Path) -> None:
    scheduler, sent, _ = simulated_scheduler(300)
    first = scheduler.operation.profiler.steps_seen + 3
    scheduler.handle(started(1, tmp_path, num_steps=4, start_step=first))
    scheduler.turn()
    assert not sent.others
    scheduler.handle(admit(0, [1, 2, 3], new=20))
    for _ in range(8):
        scheduler.turn()
    done = answered(scheduler, sent, 1)
    assert [one["args"]["step"] for one in slices(read(done.path), "step")] == list(range(first, first + 4))


def test_misuse_and_failures_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, sent, _ = simulated_scheduler(300)
    scheduler.handle(Profile(key=1, action="stop"))
    assert answered(scheduler, sent, 1).error == NOT_RUNNING
    (tmp_path / "file").write_text("")
    scheduler.handle(started(2, tmp_path / "file"))
    assert "cannot be made" in (answered(scheduler, sent, 2).error or "")
    scheduler.handle(started(3, tmp_path))
    scheduler.handle(started(4, tmp_path))
    assert answered(scheduler, sent, 4).error == RUNNING
    (tmp_path / "p-TP-0.trace.json.gz").write_text("another's")
    scheduler.handle(Profile(key=5, action="stop"))
    assert "File exists" in (answered(scheduler, sent, 5).error or "")
    monkeypatch.setattr(profiler, "MOST_STEPS", 3)
    scheduler.handle(started(6, tmp_path / "new"))
    scheduler.handle(admit(0, [1, 2, 3], new=20))
    run_to_end(scheduler)
    scheduler.handle(Profile(key=7, action="stop"))
    assert len(slices(read(answered(scheduler, sent, 7).path), "step")) == 3


def test_steps_can_be_slowed_down() -> None:
    scheduler, _, _ = simulated_scheduler(300)
    scheduler.handle(SlowDown(0.05))
    scheduler.handle(admit(0, [1, 2], new=3))
    began = time.monotonic()
    run_to_end(scheduler)
    assert time.monotonic() - began >= 0.1
    scheduler.handle(SlowDown(0.0))
    assert scheduler.operation.pause == 0.0


def test_the_hit_rate_is_that_of_the_last_requests() -> None:
    scheduler, _, _ = simulated_scheduler(300)
    prompt = list(range(1, 21))
    for key in range(2):
        scheduler.handle(admit(key, prompt, new=1))
        run_to_end(scheduler)
    state = scheduler.state()
    assert state["cache_hit_rate"] == 19 / 40
    assert state["steps"] == sum(state["step_buckets"]) and state["prefill_tokens"] == 20
