"""How much may wait, and for whom there is always room."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
from simulation import admit, change_settings, run_to_end, simulated_scheduler

from engine.wire.results import Finish
from scheduler_proc.recorder import Recorder, RecorderSettings
from scheduler_proc.scheduler import Scheduler

FULL = Finish("abort", message="The request queue is full.", status=503)


def limit(scheduler: Scheduler, requests: int | None, tokens: int | None) -> None:
    change_settings(scheduler, max_queued=requests, max_queued_tokens=tokens)


def test_requests_that_wait_are_counted() -> None:
    scheduler, sent, _ = simulated_scheduler(300, max_running=1)
    limit(scheduler, 2, None)
    scheduler.handle(admit(0, [1], new=5))
    scheduler.step()
    for key in (1, 2, 3):
        scheduler.handle(admit(key, [1], new=1))
    assert sent.finishes == {3: FULL}
    run_to_end(scheduler)
    assert {0, 1, 2} <= set(sent.tokens)


def test_prompt_tokens_that_wait_are_counted() -> None:
    scheduler, sent, _ = simulated_scheduler(300, max_running=1)
    limit(scheduler, None, 10)
    scheduler.handle(admit(0, [1], new=20))
    scheduler.step()
    scheduler.handle(admit(1, [1] * 50, new=1))  # alone it may be longer than the limit
    scheduler.handle(admit(2, [1], new=1))
    assert sent.finishes == {2: FULL}
    scheduler._abort([1])
    scheduler.handle(admit(3, [1] * 6, new=1))
    scheduler.handle(admit(4, [1] * 5, new=1))
    scheduler.handle(admit(5, [1] * 4, new=1))
    assert [key for key, finish in sent.finishes.items() if finish == FULL] == [2, 4]
    scheduler.planner.preempt(scheduler.requests[0])
    assert (scheduler.planner.queued_tokens, scheduler.planner.queued) == (11, 3)
    run_to_end(scheduler)
    assert (scheduler.planner.queued_tokens, scheduler.planner.queued) == (0, 0)


def test_an_urgent_request_pushes_out_as_many_as_it_needs_and_none_in_vain() -> None:
    scheduler, sent, _ = simulated_scheduler(300, max_running=1, priorities=True)
    limit(scheduler, None, 12)
    scheduler.handle(admit(0, [1], new=20))
    scheduler.step()
    for key, priority in [(1, 0), (2, 1), (3, 5)]:
        scheduler.handle(admit(key, [key] * 4, new=1, priority=priority))
    scheduler.handle(admit(4, [4] * 9, new=1, priority=3))
    assert sent.finishes == {4: FULL}
    scheduler.handle(admit(5, [5] * 8, new=1, priority=3))
    outranked = Finish("abort", message="The request is aborted by a higher priority request.", status=503)
    assert {key: sent.finishes[key] for key in (1, 2)} == {1: outranked, 2: outranked}
    run_to_end(scheduler)
    assert {3, 5} <= set(sent.tokens)


def test_a_probe_always_finds_room_and_takes_none() -> None:
    scheduler, sent, _ = simulated_scheduler(300, max_running=1)
    limit(scheduler, 1, 1)
    scheduler.handle(admit(0, [1], new=20))
    scheduler.step()
    scheduler.handle(msgspec.structs.replace(admit(1, [0], new=1), probe=True))
    scheduler.handle(admit(2, [2], new=1))
    scheduler.handle(msgspec.structs.replace(admit(3, [0], new=1), probe=True))
    assert sent.finishes == {}
    scheduler.handle(admit(4, [3], new=1))
    assert sent.finishes == {4: FULL}
    run_to_end(scheduler)
    assert {0, 1, 2, 3} <= set(sent.tokens)
    assert (scheduler.planner.queued, scheduler.planner.queued_probes, scheduler.planner.queued_tokens) == (0, 0, 0)


def test_a_file_of_the_recorder_is_the_users_alone(tmp_path: Path) -> None:
    recorder = Recorder(RecorderSettings(mode="stat", passes=1, folder=tmp_path, layers=(0,), experts=2))
    before = os.umask(0)
    try:
        path = recorder.dump(rank=0)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
