"""Steps that overlap: requests are answered as by steps one after the other, whatever happens between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import VOCABULARY, HashModel, Sent, admit, expected_tokens, run_to_end, scheduler_over

from engine.kernels.batch import RaggedBatch
from engine.kernels.eager import EagerBackend
from engine.kernels.queued import Draws, Outcome, Scores
from engine.kernels.table import Longs, Rows
from engine.wire.sampling import LogprobOptions
from engine.wire.to_scheduler import Abort, Admit
from scheduler_proc.scheduler import Scheduler


class QueueingModel(HashModel):
    """The fake model as a device: what it samples is fed into its next step, and told when it is asked."""

    def __init__(self, pool: int) -> None:
        super().__init__(pool)
        self.last: Longs = np.empty(0, np.int64)
        self.untold = 0
        self.most_untold = 0
        self.queued = 0

    def queue(
        self, batch: RaggedBatch, rows: Rows, sources: Longs, draws: Draws | None, scores: Scores | None
    ) -> Callable[[], Outcome]:
        ids = batch.token_ids.clone()
        fed = sources >= 0
        ids[torch.from_numpy(fed)] = torch.from_numpy(self.last[sources[fed]])
        logits = self.run(dataclasses.replace(batch, token_ids=ids), rows)
        backend = EagerBackend()
        tokens, peaks = backend.best(logits)
        if draws is not None:
            columns = draws.temperatures, draws.top_ks, draws.top_ps, draws.min_ps, draws.uniforms
            tokens[draws.rows] = backend.draw(logits, draws.rows, *columns)
        found = None
        if scores is not None:
            tops = np.minimum(scores.tops, VOCABULARY)
            chosen = tokens[scores.rows]
            found = backend.logprobs(
                logits, scores.rows, scores.temperatures, chosen, tops, scores.id_counts, scores.ids
            )
        self.last = tokens
        self.queued += 1
        self.untold += 1
        self.most_untold = max(self.most_untold, self.untold)

        def outcome() -> Outcome:
            self.untold -= 1
            return Outcome(tokens, peaks, VOCABULARY, found)

        return outcome


def overlapping(pool: int, **limits: Any) -> tuple[Scheduler, Sent, QueueingModel]:
    model = QueueingModel(pool)
    scheduler, sent = scheduler_over(
        EagerBackend(), model, pool, longest=min(200, pool) - 1, eos_ids=[0], queueing=model, **limits
    )
    return scheduler, sent, model


KINDS: list[dict[str, Any]] = [
    {}, {"temperature": 0.9, "seed": 5}, {"temperature": 1.0, "seed": 6, "top_p": 0.8, "top_k": 9},
    {"logprobs": LogprobOptions(top=2, ids=[4])}, {"temperature": 0.7, "seed": 1, "logprobs": LogprobOptions(top=60)},
    {"repetition_penalty": 1.3}, {"logprobs": LogprobOptions(start=1)}, {"min_new_tokens": 3},
]  # fmt: skip

requests = st.lists(
    st.tuples(
        st.integers(0, 30),  # the step before which it comes
        st.integers(1, 40), st.integers(0, 3),  # its prompt, and which of several beginnings that has
        st.integers(0, 25), st.sampled_from(KINDS), st.lists(st.integers(1, 49), max_size=6),
        st.one_of(st.none(), st.integers(1, 40)),  # the step before which it is aborted
    ),
    min_size=1, max_size=8,
)  # fmt: skip


def question(key: int, length: int, beginning: int, new: int, kind: dict[str, Any], stops: list[int]) -> Admit:
    prompt = [(position * 3 + beginning * 11) % 48 + 1 for position in range(length)]
    return admit(key, prompt, new=new, stop_token_ids=stops, **kind)


def play(scheduler: Scheduler, cases: list[Any]) -> None:
    for step in range(42):
        for key, (begin, length, beginning, new, kind, stops, abort) in enumerate(cases):
            if begin == step:
                scheduler.handle(question(key, length, beginning, new, kind, stops))
            if abort is not None and abort == step:
                scheduler.handle(Abort([key]))
        if scheduler.requests:
            scheduler.step()
            scheduler.planner.memory.check(scheduler.planner.running)
    run_to_end(scheduler)


@settings(deadline=None, max_examples=150)
@given(cases=requests, pool=st.integers(70, 400), budget=st.integers(3, 40), running=st.integers(1, 8))
def test_answers_are_those_of_steps_one_after_the_other(cases: list[Any], pool: int, budget: int, running: int) -> None:
    limits = {"prefill_budget": budget, "max_running": running}
    scheduler, sent, model = overlapping(pool, **limits)
    play(scheduler, cases)
    scheduler._settle()
    assert model.untold == 0 and model.most_untold <= 2
    plain, expected = scheduler_over(
        EagerBackend(), HashModel(pool), pool, longest=min(200, pool) - 1, eos_ids=[0], **limits
    )
    play(plain, cases)
    for key, case in enumerate(cases):
        if case[-1] is None:  # how far an aborted one has come is a matter of time
            assert sent.tokens[key] == expected.tokens[key] and sent.finishes[key] == expected.finishes[key]
            assert sent.logprobs.get(key) == expected.logprobs.get(key)
            assert sent.opened[key].input_logprobs == expected.opened[key].input_logprobs
        elif key in sent.tokens and key in expected.tokens:
            both = min(len(sent.tokens[key]), len(expected.tokens[key]))
            assert sent.tokens[key][:both] == expected.tokens[key][:both]


def test_a_step_is_queued_before_the_one_before_it_is_read() -> None:
    scheduler, sent, model = overlapping(300)
    scheduler.handle(admit(0, [1, 2, 3], new=6))
    scheduler.step()
    assert model.queued == model.untold == 1 and not sent.tokens
    scheduler.step()
    assert model.queued == 2 and model.untold == 1 and len(sent.tokens[0]) == 1
    scheduler.handle(admit(1, [4, 5], new=6))  # an admission waits for nothing
    assert model.untold == 1
    scheduler.handle(Abort([1]))  # all else does
    assert model.untold == 0 and len(sent.tokens[0]) == 2
    run_to_end(scheduler)
    assert model.queued == 6, "no token beyond the last is computed where the length is known"


def test_a_step_that_cannot_be_queued_is_computed_by_itself() -> None:
    scheduler, sent, model = overlapping(300)
    queue = model.queue

    def failing(*arguments: Any) -> Callable[[], Outcome]:
        if model.queued == 3:
            model.queued += 1
            raise MemoryError("no memory for the queue")
        return queue(*arguments)

    model.queue = failing  # type: ignore[method-assign]
    scheduler.handle(admit(0, [1, 2, 3], new=9))
    scheduler.handle(admit(1, [1, 2, 3, 4], new=9))
    run_to_end(scheduler)
    plain, expected, _ = overlapping(300)
    plain.handle(admit(0, [1, 2, 3], new=9))
    plain.handle(admit(1, [1, 2, 3, 4], new=9))
    run_to_end(plain)
    assert sent.tokens == expected.tokens and sent.finishes == expected.finishes


def test_a_request_that_comes_again_has_nothing_of_the_step_in_flight() -> None:
    """As after the death of another process: the same key, a later attempt, its output so far known."""
    scheduler, sent, model = overlapping(300)
    prompt, answer = [1, 2, 3], expected_tokens([1, 2, 3], 9)
    scheduler.handle(admit(0, prompt, new=9))
    scheduler.handle(admit(1, [4, 5], new=9))
    for _ in range(3):
        scheduler.step()
    assert model.untold == 1
    sent.tokens.pop(0), sent.opened.pop(0)
    scheduler.handle(msgspec.structs.replace(admit(0, prompt, new=9, earlier=answer[:1]), attempt=1))
    scheduler.planner.memory.check(scheduler.planner.running)
    run_to_end(scheduler)
    assert sent.tokens == {0: answer, 1: expected_tokens([4, 5], 9)}


def test_logits_that_are_no_numbers_end_their_request_alone() -> None:
    scheduler, sent, model = overlapping(300)
    logits = model.logits

    def broken(rows: Rows) -> torch.Tensor:
        made = logits(rows)
        if model.queued == 3:
            made[0] = torch.nan
        return made

    model.logits = broken  # type: ignore[method-assign]
    scheduler.handle(admit(0, [1, 2, 3], new=9))
    scheduler.handle(admit(1, [4, 5], new=9))
    run_to_end(scheduler)
    assert sent.finishes[0].matched == "NaN happened" and len(sent.tokens[0]) == 3
    assert sent.tokens[1] == expected_tokens([4, 5], 9)
