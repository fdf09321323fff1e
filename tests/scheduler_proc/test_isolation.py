"""A failure ends the request that causes it, and nothing else: not its neighbours in a step, not the loop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulation import (
    HashModel,
    Sent,
    admit,
    answer_to,
    expected_tokens,
    run_to_end,
    scheduler_over,
    simulated_scheduler,
)
from test_vectors import vector_of, vector_scheduler

from engine.checkpoints.task import Task
from engine.config import faults
from engine.kernels.batch import RaggedBatch
from engine.kernels.eager import EagerBackend
from engine.kernels.table import Rows
from engine.wire.results import Finish
from engine.wire.sampling import LogprobOptions
from engine.wire.to_detokenizer import StepOutput
from engine.wire.to_frontend import Vectors
from engine.wire.to_scheduler import Admit, VectorOptions
from scheduler_proc.kv_memory import InvariantError
from scheduler_proc.planner import GROW_AFTER
from scheduler_proc.recorder import Recorder, RecorderSettings
from scheduler_proc.runner import Runner
from scheduler_proc.scheduler import Scheduler
from scheduler_proc.steps import OUT_OF_MEMORY, halved

POISON = 60
"""No other prompt has this id, and the fake model never makes it."""
KINDS = [{}, {"repetition_penalty": 1.3}, {"temperature": 0.9, "seed": 5}, {"frequency_penalty": 4.0}]


@pytest.fixture(autouse=True)
def unarmed() -> Iterator[None]:
    faults.arm(None)
    yield
    faults.arm(None)


def arm(where: str, what: str = "raise", times: int | None = None, token: int = POISON) -> None:
    faults.arm(json.dumps([{"where": where, "token": token, "what": what, "times": times}]))


class Scribbler(HashModel):
    """Fails whenever the poison is in the batch, having overwritten the KV of all that is in it. failures: so far."""

    failures = 0
    most = 10**9

    def run(self, batch: RaggedBatch, rows: Rows) -> torch.Tensor:
        if POISON in self.tokens[batch.context_slots].tolist() + batch.token_ids.tolist() and self.failures < self.most:
            self.failures += 1
            self.tokens[batch.slots] = -7
            self.positions[batch.slots] = -7
            raise RuntimeError("scribbled")
        return super().run(batch, rows)


def served(model: HashModel, requests: list[Admit], **limits: Any) -> tuple[Scheduler, Sent]:
    """`requests` run to their ends: half of them arrive at once, the others step by step; then all once more."""
    pool = len(model.tokens)
    scheduler, sent = scheduler_over(EagerBackend(), model, pool, longest=min(200, pool) - 1, eos_ids=[0], **limits)
    half = len(requests) // 2
    for one in requests[:half]:
        scheduler.handle(one)
    for one in requests[half:]:
        scheduler.step()
        scheduler.planner.memory.check(scheduler.planner.running)
        scheduler.handle(one)
    run_to_end(scheduler)
    return scheduler, sent


def requests_of(prompts: list[list[int]], culprit: int) -> list[Admit]:
    """The prompts twice, so that the second ones find what the first ones have left in the tree."""
    found = []
    for key, prompt in enumerate([*prompts, *prompts]):
        bad = key % len(prompts) == culprit
        kind = {} if bad else KINDS[key % len(KINDS)]
        logprobs = LogprobOptions(start=0, top=2) if key % 3 == 0 and not bad else None
        found.append(admit(key, prompt, new=3 + key % 7, logprobs=logprobs, **kind))
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_others_end_as_if_nothing_had_happened(data: st.DataObject) -> None:
    base = data.draw(st.lists(st.integers(1, 48), min_size=1, max_size=40))
    prompts = [
        base[: data.draw(st.integers(1, len(base)))] + data.draw(st.lists(st.integers(1, 48), max_size=6))
        for _ in range(data.draw(st.integers(1, 9)))
    ]
    culprit = data.draw(st.integers(0, len(prompts) - 1))
    prompts[culprit].insert(data.draw(st.integers(0, len(prompts[culprit]))), POISON)
    requests = requests_of(prompts, culprit)
    where = data.draw(st.sampled_from(["admit", "allocate", "forward", "sample", "emit", "scribble"]))
    once = data.draw(st.booleans())
    limits: dict[str, Any] = {"prefill_budget": data.draw(st.sampled_from([4, 16, 64])), "max_running": 6}
    pool = data.draw(st.sampled_from([70, 400]))

    faults.arm(None)
    _, calm = served(HashModel(pool), requests, **limits)
    model = Scribbler(pool)
    if where == "scribble":
        model.most = 1 if once else 10**9
    else:
        model.most = 0
        arm(where, times=1 if once else None)
    _, sent = served(model, requests, **limits)

    lost = {one.key for one in requests if one.key % len(prompts) == culprit}
    if once:  # what is tried again costs nothing the second time
        found = {key for key, finish in sent.finishes.items() if finish.status == 500}
        assert len(found) == (where in ("admit", "emit")) and found <= lost
        lost = found
    for one in requests:
        finish = sent.finishes[one.key]
        if one.key in lost:
            assert finish.status == 500 and f"request {one.key}" in str(finish.message)
        else:
            assert finish == calm.finishes[one.key] and sent.tokens[one.key] == calm.tokens[one.key]
            assert sent.logprobs.get(one.key) == calm.logprobs.get(one.key)
            assert sent.opened[one.key].input_logprobs == calm.opened[one.key].input_logprobs
            assert sent.opened[one.key].output_ids == calm.opened[one.key].output_ids


def test_a_failed_pass_is_run_again_and_then_request_by_request(caplog: pytest.LogCaptureFixture) -> None:
    prompts = [[1, 2], [3, POISON], [4, 5]]
    for most, lost in ((1, False), (2, False), (10**9, True)):
        model = Scribbler(100)
        model.most = most
        scheduler, sent = scheduler_over(EagerBackend(), model, 100, longest=90, eos_ids=[0])
        for key, prompt in enumerate(prompts):
            scheduler.handle(admit(key, prompt, new=4))
        scheduler.step()
        assert model.failures == min(most, 3)  # together, together again, alone
        assert (sent.finishes.keys() == {1}) is lost
        run_to_end(scheduler)
        for key, prompt in enumerate(prompts):
            if not (lost and key == 1):
                assert sent.tokens[key] == expected_tokens(prompt, 4)
    assert sent.finishes[1].message == "Internal error while computing request request 1: RuntimeError: scribbled"
    assert "Request request 1 failed" in caplog.text and 'raise RuntimeError("scribbled")' in caplog.text


class Narrow(HashModel):
    """Has memory for `room` tokens a step, and for none of the poison."""

    room = 10
    refused = 0

    def run(self, batch: RaggedBatch, rows: Rows) -> torch.Tensor:
        if batch.num_tokens > self.room or POISON in batch.token_ids.tolist():
            self.refused += 1
            raise MemoryError("no room")
        return super().run(batch, rows)


def test_a_step_that_memory_is_too_small_for_shrinks() -> None:
    prompts = [[1 + (7 * key + i) % 48 for i in range(3 + 9 * key)] for key in range(6)] + [[2, POISON, 5]]
    requests = [admit(key, prompt, new=12) for key, prompt in enumerate(prompts)]
    scheduler, sent = served(Narrow(400), requests, prefill_budget=64, max_running=16)
    for key, prompt in enumerate(prompts[:-1]):
        assert sent.tokens[key] == expected_tokens(prompt, 12)
    assert sent.finishes[6] == Finish("abort", message=OUT_OF_MEMORY, status=500)
    assert scheduler.planner.preemptions == 0


@pytest.mark.parametrize("chunked", [True, False])
def test_steps_stay_small_while_memory_is_short_and_grow_again(chunked: bool) -> None:
    """A few passes fail, not one a step; all requests get on meanwhile; at last the steps are as large as ever."""
    model = Narrow(5000)
    model.room = 10**9
    scheduler, sent = scheduler_over(
        EagerBackend(), model, 5000, longest=250, eos_ids=[], prefill_budget=64, max_running=24, chunked=chunked
    )
    prompts = [[1 + (7 * key + i) % 48 for i in range(3)] for key in range(20)]
    for key, prompt in enumerate(prompts):
        scheduler.handle(admit(key, prompt, new=160, ignore_eos=True))
    scheduler.step()
    model.room, model.refused = 7, 0
    for _ in range(60):
        scheduler.step()
        scheduler.planner.memory.check(scheduler.planner.running)
    made = [len(sent.tokens[key]) for key in range(20)]
    assert min(made) >= 60 * 5 / 20 * 0.6 and max(made) - min(made) < 10
    assert model.refused <= 2 + 60 / GROW_AFTER
    model.room = 10**9
    steps = 0
    while scheduler.planner.room is not None:
        scheduler.step()
        steps += 1
    assert steps <= 10 * GROW_AFTER
    model.largest_batch = 0
    scheduler.step()
    assert model.largest_batch == 20 and scheduler.planner.preemptions == 0
    run_to_end(scheduler)
    assert all(sent.tokens[key] == expected_tokens(prompt, 160) for key, prompt in enumerate(prompts))


def test_whole_prompts_are_left_out_but_never_cut() -> None:
    scheduler, _, _ = simulated_scheduler(300, prefill_budget=100)
    for key, size in enumerate((30, 5, 9)):
        scheduler.handle(admit(key, [1 + (key + i) % 48 for i in range(size)]))
    plan: list[Any] = []
    scheduler.planner.plan(plan, [])
    assert [step.count for step in plan] == [30, 5, 9]
    assert [step.count for step in halved(plan, chunked=True)] == [22]
    assert [step.count for step in halved(plan, chunked=False)] == [30]
    assert halved(plan[:1], chunked=False) == [] and halved(plan[1:2], chunked=True)[0].count == 2


@pytest.mark.parametrize("where", ["forward", "emit", "allocate"])
@pytest.mark.parametrize("whole", [True, False])
def test_vectors(where: str, whole: bool) -> None:
    task = Task(kind="embedding", normalise=False)
    prompts = [[1, 2, 3], [4, POISON], [5, 6], [7] * 9]
    arm(where, "memory" if where == "allocate" else "raise")
    scheduler, sent, _ = vector_scheduler(whole=whole, task=task)
    for key, prompt in enumerate(prompts):
        scheduler.handle(admit(key, prompt, new=0, vector=VectorOptions()))
    run_to_end(scheduler)
    keys = [key for message in sent.others if isinstance(message, Vectors) for key in message.keys]
    assert sorted(keys) == [0, 2, 3] and sent.finishes.keys() == {1} and sent.finishes[1].status == 500
    entries = b"".join(message.entries for message in sent.others)
    rows = torch.frombuffer(bytearray(entries), dtype=torch.float32).view(3, -1).tolist()
    assert dict(zip(keys, rows, strict=True)) == {key: vector_of(prompts[key], [0] * len(prompts[key])) for key in keys}


def test_a_request_that_cannot_be_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, sent, _ = simulated_scheduler(300)
    memory = scheduler.planner.memory
    extend = memory.extend

    def failing(request: Any, count: int) -> bool:
        if request.key == 1 and request.generated == 2:
            raise RuntimeError("no plan")
        return extend(request, count)

    monkeypatch.setattr(memory, "extend", failing)
    prompts = [[1, 2], [3, 4], [5, 6]]
    for key, prompt in enumerate(prompts):
        scheduler.handle(admit(key, prompt))
    run_to_end(scheduler)
    assert sent.finishes[1].status == 500 and "planning request request 1" in str(sent.finishes[1].message)
    for key in (0, 2):
        assert sent.tokens[key] == expected_tokens(prompts[key], 8)


class Picky(Sent):
    """Cannot encode a message with a token of request 1 once that has two."""

    def send(self, message: Any) -> None:
        if isinstance(message, StepOutput) and 1 in message.keys and len(self.tokens.get(1, [])) == 2:
            raise TypeError("cannot be encoded")
        super().send(message)


def test_a_row_that_cannot_be_sent() -> None:
    scheduler, _, _ = simulated_scheduler(300)
    sent = Picky()
    answer_to(scheduler, sent)
    prompts = [[1, 2], [3, 4], [5, 6]]
    for key, prompt in enumerate(prompts):
        scheduler.handle(admit(key, prompt))
    run_to_end(scheduler)
    assert sent.finishes[1].status == 500 and "sending request request 1" in str(sent.finishes[1].message)
    for key in (0, 2):
        assert sent.tokens[key] == expected_tokens(prompts[key], 8)


def test_a_pool_that_a_failure_has_broken_ends_the_loop() -> None:
    """What nobody can vouch for is computed anew by another process."""
    scheduler, _, _ = simulated_scheduler(300)
    arm("forward")
    scheduler.handle(admit(0, [1, POISON]))
    scheduler.planner.memory.pool.take(1)  # type: ignore[attr-defined]
    with pytest.raises(InvariantError):
        scheduler.step()


def test_a_failing_recorder_costs_the_record_alone(caplog: pytest.LogCaptureFixture) -> None:
    scheduler, sent, _ = simulated_scheduler(300)
    recorder = Recorder(RecorderSettings("stat", 9, Path(), (0,), 4))
    recorder.on = True
    scheduler.steps.runner = Runner(scheduler.runner.program, scheduler.backend, recorder)  # its step raises
    scheduler.handle(admit(0, [1, 2]))
    run_to_end(scheduler)
    assert sent.tokens[0] == expected_tokens([1, 2], 8) and not recorder.on
    assert "recording ends" in caplog.text
