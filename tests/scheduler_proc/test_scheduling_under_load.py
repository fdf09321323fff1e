"""What the scheduler does when the queue is long, the pool is full or the server stands still."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
from simulation import admit, change_settings, expected_tokens, run_to_end, simulated_scheduler

from engine.wire.results import Finish
from engine.wire.sampling import LogprobOptions
from engine.wire.to_frontend import Flushed
from engine.wire.to_scheduler import Abort, FlushCache
from scheduler_proc import planner
from scheduler_proc.kv_memory import InvariantError, KvMemory
from scheduler_proc.statistics import Statistics


def test_a_preempted_request_is_not_pushed_out_of_the_full_queue() -> None:
    scheduler, sent, _ = simulated_scheduler(300, priorities=True)
    change_settings(scheduler, max_queued=1)
    scheduler.handle(admit(0, [1, 2, 3], new=20, priority=-1))
    scheduler.step()
    scheduler.planner.preempt(scheduler.requests[0])
    scheduler.handle(admit(1, [4], new=1, priority=5))
    assert sent.finishes == {1: Finish("abort", message="The request queue is full.", status=503)}
    run_to_end(scheduler)
    assert sent.tokens[0] == expected_tokens([1, 2, 3], 20)


def test_a_flush_that_may_wait_does_not_hold_up_one_that_may_not() -> None:
    scheduler, sent, _ = simulated_scheduler(300)
    scheduler.handle(admit(0, [1, 2, 3], new=5))
    scheduler.step()
    scheduler.handle(FlushCache(1, 60.0))
    scheduler.handle(FlushCache(2, 0.0))
    scheduler._answer_flushes()
    assert sent.others == [Flushed(2, False)]
    run_to_end(scheduler)
    scheduler._answer_flushes()
    assert sent.others == [Flushed(2, False), Flushed(1, True)]


@pytest.mark.parametrize(("steps", "entries", "recomputed"), [(2, 14, 4), (12, 17, 1)])
def test_prompt_logprobs_that_are_there_are_not_computed_again(steps: int, entries: int, recomputed: int) -> None:
    """A preemption in the middle of the prompt, and one in the middle of the output."""
    prompt = list(range(1, 21))
    scheduler, sent, model = simulated_scheduler(300, prefill_budget=8)
    scheduler.handle(admit(0, prompt, new=30, logprobs=LogprobOptions(start=3)))
    for _ in range(steps):
        scheduler.step()
    request = scheduler.requests[0]
    assert request.prompt_logprobs is not None and len(request.prompt_logprobs.tokens) == entries
    scheduler.planner.preempt(request)
    before = model.computed
    scheduler.step()
    assert model.computed - before == recomputed
    run_to_end(scheduler)
    assert sent.tokens[0] == expected_tokens(prompt, 30)
    found = sent.opened[0].input_logprobs
    assert found is not None and [token for _, token in found.tokens] == prompt[3:]


def test_only_so_many_requests_are_compared_with_a_running_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0

    def counted(*arrays: Any) -> int:
        nonlocal compared
        compared += 1
        return shared_length(*arrays)

    shared_length = planner.shared_length
    monkeypatch.setattr(planner, "shared_length", counted)
    monkeypatch.setattr(planner, "MOST_PASSED_OVER", 10)
    scheduler, sent, _ = simulated_scheduler(2_000, prefill_budget=64)
    prompt = list(range(1, 50))
    for key in range(40):
        scheduler.handle(admit(key, prompt, new=2))
    scheduler.step()
    assert compared == 10
    run_to_end(scheduler)
    assert all(sent.tokens[key] == expected_tokens(prompt, 2) for key in range(40))


def test_the_queue_is_not_put_in_order_while_every_place_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, _, _ = simulated_scheduler(300, max_running=1, longest_prefix_first=True)
    for key in range(4):
        scheduler.handle(admit(key, [1, 2, 3, key], new=5))
    scheduler.step()
    tree = scheduler.planner.memory.tree
    looked_up: list[int] = []
    match_length = tree.match_length

    def counted(space: str | None, tokens: Any) -> int:
        looked_up.append(len(tokens))
        return match_length(space, tokens)

    monkeypatch.setattr(tree, "match_length", counted)
    scheduler.step()
    assert not looked_up
    run_to_end(scheduler)
    assert looked_up


def test_a_slot_held_twice_and_a_lost_one_are_noticed() -> None:
    memory = KvMemory(8, reuse=True)
    slots = memory.pool.take(3)
    with pytest.raises(InvariantError, match="free 5"):
        memory.check([])
    memory.tree.insert(None, np.arange(3, dtype=np.int32), slots)
    memory.check([])
    next(memory.tree.nodes()).slots[0] = slots[1]
    with pytest.raises(InvariantError, match="7 different"):
        memory.check([])


def test_throughput_counts_the_seconds_of_steps_only() -> None:
    """However long the server stood still between two steps of an interval."""
    scheduler, _, _ = simulated_scheduler(300)
    statistics = Statistics(interval=2)
    for _ in range(2):
        statistics.step([], 4, 0.5, scheduler.planner)
    assert statistics.throughput == 8.0


def test_the_prefill_of_a_request_that_comes_back_is_shared_at_once() -> None:
    prompt = list(range(1, 41))
    whole = expected_tokens(prompt, 10)
    scheduler, sent, model = simulated_scheduler(300, prefill_budget=64)
    scheduler.handle(admit(0, prompt, new=10, earlier=whole[:5]))
    scheduler.step()
    assert model.computed == 45
    scheduler.handle(admit(1, prompt, new=10))
    scheduler.step()
    assert model.computed == 45 + 1 + 1
    run_to_end(scheduler)
    assert sent.tokens == {0: whole, 1: whole}
    assert sent.opened[1].cached_tokens == 39


def test_a_rush_of_messages_does_not_hold_up_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler_proc.scheduler.HEARING", 0.0)
    scheduler, sent, _ = simulated_scheduler(400)
    scheduler.handle(admit(0, [1, 2, 3], new=20))
    scheduler.turn()
    waiting: deque[Any] = deque(admit(key, [1 + key % 40, 5, 6], new=2) for key in range(1, 400))
    waiting.append(Abort([399]))

    class Rush:
        def drain(self, most: int) -> list[Any]:
            return [waiting.popleft() for _ in range(min(most, len(waiting)))]

    scheduler.inbox = Rush()  # type: ignore[assignment]
    monkeypatch.setattr(type(sent), "known", lambda _sent, _message: False, raising=False)
    while waiting:
        before, made = len(waiting), len(sent.tokens[0])
        scheduler.hear()
        assert 0 < before - len(waiting) < 100
        scheduler.turn()
        assert len(sent.tokens[0]) == made + 1 or 0 in sent.finishes
    while scheduler.requests:
        scheduler.turn()
    assert set(sent.finishes) == set(range(400))
    assert sent.finishes[399].kind == "abort"
