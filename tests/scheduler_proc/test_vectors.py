"""Requests for vectors: planned, computed and answered, whole prompts at once or over the KV pool."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from simulation import Sent, admit, run_to_end, scheduler_over

from engine.checkpoints.task import Task
from engine.kernels.batch import RaggedBatch
from engine.kernels.eager import EagerBackend
from engine.kernels.table import Rows
from engine.wire.to_frontend import Vectors
from engine.wire.to_scheduler import VectorOptions
from scheduler_proc.memory import Memory
from scheduler_proc.scheduler import Scheduler
from scheduler_proc.step_memory import StepMemory

WIDTH = 6
POISON = 49
"""A token that makes its sequence's vector infinite."""


def vector_of(tokens: list[int], types: list[int]) -> list[float]:
    """What the fake model makes of a sequence."""
    return [sum((t + 1) * (p + 2) ** (i % 3) + 5 * s for p, (t, s) in enumerate(zip(tokens, types, strict=True))) / 64.0
            for i in range(WIDTH)]  # fmt: skip


@dataclass
class SumModel:
    """A program that writes tokens into its memory and reads whole sequences back. steps: tokens of each."""

    slots: int
    steps: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = torch.full((self.slots,), -1, dtype=torch.int64)
        self.vectors = torch.empty(0)

    def run(self, batch: RaggedBatch, rows: Rows) -> torch.Tensor:
        assert len(set(batch.slots.tolist())) == batch.num_tokens
        self.tokens[batch.slots] = batch.token_ids
        self.steps.append(batch.num_tokens)
        ends = {stop - 1: s for s, stop in enumerate(batch.query_starts[1:])}
        made = []
        for row in rows.tolist():
            s = ends[row]
            tokens = self.tokens[batch.context_slots[batch.context_starts[s] : batch.context_starts[s + 1]]].tolist()
            types = [0] * len(tokens)
            if batch.type_ids is not None:
                types = batch.type_ids[batch.query_starts[s] : batch.query_starts[s + 1]].tolist()
            row_of = vector_of(tokens, types)
            made.append([float("inf")] * WIDTH if POISON in tokens else row_of)
        self.vectors = torch.tensor(made).view(len(made), WIDTH)
        return self.vectors

    def logits(self, rows: Rows) -> torch.Tensor:
        raise NotImplementedError

    def pooled(self) -> torch.Tensor:
        return self.vectors + 1


def vector_scheduler(
    *, whole: bool, task: Task, budget: int = 24, longest: int = 40
) -> tuple[Scheduler, Sent, SumModel]:
    running = 16
    size = max(budget, longest) + running if whole else 200
    memory: Memory | None = StepMemory(size) if whole else None
    model = SumModel(size)
    scheduler, sent = scheduler_over(
        EagerBackend(), model, size, longest=longest, eos_ids=[], task=task, memory=memory,
        prefill_budget=budget, chunked=not whole, max_running=running,
    )  # fmt: skip
    return scheduler, sent, model


def answers(sent: Sent) -> dict[int, list[float]]:
    found = {}
    for message in sent.others:
        assert isinstance(message, Vectors)
        entries = np.frombuffer(message.entries, "<f4")
        starts = np.cumsum([0, *message.widths])
        for i, key in enumerate(message.keys):
            assert key not in found
            found[key] = entries[starts[i] : starts[i + 1]].tolist()
    return found


@pytest.mark.parametrize("whole", [True, False])
def test_every_request_gets_its_own_vector(whole: bool) -> None:
    draw = random.Random(5)
    scheduler, sent, model = vector_scheduler(whole=whole, task=Task(kind="classifier", width=WIDTH))
    lengths = [draw.choice([1, 1, 2, 7, 23, 24, 25, 40]) for _ in range(200)]
    prompts = [[draw.randrange(POISON) for _ in range(length)] for length in lengths]
    for key, prompt in enumerate(prompts):
        scheduler.handle(admit(key, prompt, new=0, vector=VectorOptions()))
    run_to_end(scheduler)
    assert answers(sent) == {
        key: np.array(vector_of(prompt, [0] * len(prompt)), np.float32).tolist() for key, prompt in enumerate(prompts)
    }
    assert not sent.finishes and sum(model.steps) <= sum(lengths)
    if whole:
        assert sum(model.steps) == sum(lengths)
        assert len(model.steps) < 1.25 * sum(lengths) / 24, "short prompts share their steps"


def test_types_dimensions_and_hidden_states_reach_the_answer() -> None:
    scheduler, sent, _ = vector_scheduler(whole=True, task=Task(kind="embedding", width=WIDTH, normalise=True))
    types = bytes([0, 0, 1, 1, 1])
    options = VectorOptions(type_ids=types, dimensions=2, with_hidden=True)
    scheduler.handle(admit(1, [3, 4, 5, 6, 7], new=0, vector=options))
    scheduler.handle(admit(2, [3, 4], new=0, vector=VectorOptions()))
    run_to_end(scheduler)
    (message,) = sent.others
    exact = np.array(vector_of([3, 4, 5, 6, 7], list(types)))
    plain = np.array(vector_of([3, 4], [0, 0]))
    np.testing.assert_allclose(answers(sent)[1], exact[:2] / np.linalg.norm(exact[:2]), rtol=1e-6)
    np.testing.assert_allclose(answers(sent)[2], plain / np.linalg.norm(plain), rtol=1e-6)
    assert message.widths == [2, WIDTH] and message.prompt_tokens == [5, 2] and list(message.hidden) == [0]
    np.testing.assert_allclose(np.frombuffer(message.hidden[0], "<f4"), exact + 1, rtol=1e-6)


def test_a_vector_that_is_not_finite_fails_alone() -> None:
    scheduler, sent, _ = vector_scheduler(whole=True, task=Task(kind="embedding", width=WIDTH))
    for key, prompt in enumerate(([1, 2], [3, POISON], [4, 5])):
        scheduler.handle(admit(key, prompt, new=0, vector=VectorOptions()))
    run_to_end(scheduler)
    assert set(answers(sent)) == {0, 2}
    assert sent.finishes[1].status == 500 and "not finite" in (sent.finishes[1].message or "")


def test_what_does_not_fit_the_server_is_refused() -> None:
    scheduler, sent, _ = vector_scheduler(whole=True, task=Task(kind="embedding", width=WIDTH))
    scheduler.handle(admit(1, [1] * 40, new=0, vector=VectorOptions()))
    scheduler.handle(admit(2, [1] * 41, new=0, vector=VectorOptions()))
    scheduler.handle(admit(3, [1] * 4, new=4))
    run_to_end(scheduler)
    assert set(answers(sent)) == {1}
    assert sent.finishes[2].status == 400 and "41 tokens" in (sent.finishes[2].message or "")
    assert sent.finishes[3].status == 400 and "embedding only" in (sent.finishes[3].message or "")
