"""A scheduler without processes: a model that reads its context back from the KV pool and answers with a hash of it.

If a slot were lost, shared wrongly or overwritten, the hash and with it the tokens would come out wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch

from engine.checkpoints.task import Task
from engine.kernels.batch import RaggedBatch
from engine.kernels.eager import EagerBackend
from engine.kernels.queued import QueueingProgram
from engine.kernels.table import Backend, Program, Rows
from engine.wire.results import Finish, TokenLogprobs
from engine.wire.sampling import LogprobOptions, Sampling, TextOptions
from engine.wire.to_detokenizer import NO_TOKEN, Opened, StepOutput
from engine.wire.to_frontend import Ended
from engine.wire.to_scheduler import Admit, VectorOptions
from scheduler_proc.kv_memory import KvMemory
from scheduler_proc.memory import Memory
from scheduler_proc.planner import Planner, PlannerLimits
from scheduler_proc.runner import Runner
from scheduler_proc.scheduler import Scheduler
from scheduler_proc.settings import SchedulerSettings
from scheduler_proc.statistics import Statistics
from scheduler_proc.weight_updates import WeightUpdates

VOCABULARY = 50
EOS = 0
GENERATION = Task()


def next_token(context: list[int]) -> int:
    """What the fake model generates after `context`."""
    state = 17
    for position, token in enumerate(context):
        state = (state * 31 + token * 7 + position) % 1_000_003
    return 1 + state % (VOCABULARY - 1)


class HashModel:
    """The program of a fake model: writes (token, position) into its pool, reads whole contexts back, and makes one-hot
    logits of their hash."""

    def __init__(self, pool: int) -> None:
        self.tokens = torch.full((pool,), -1, dtype=torch.int64)
        self.positions = torch.full((pool,), -1, dtype=torch.int64)
        self.answers = torch.empty(0, dtype=torch.int64)
        self.computed = 0
        self.largest_batch = 0
        self.profiled = False

    def run(self, batch: RaggedBatch, rows: Rows) -> torch.Tensor:
        self.tokens[batch.slots] = batch.token_ids
        self.positions[batch.slots] = batch.positions
        self.computed += batch.num_tokens
        self.largest_batch = max(self.largest_batch, batch.num_tokens)
        answers = []
        for sequence, length in enumerate(batch.context_lengths):
            slots = batch.context_slots[batch.context_starts[sequence] : batch.context_starts[sequence + 1]]
            assert self.positions[slots].tolist() == list(range(length))
            tokens = self.tokens[slots].tolist()
            count = batch.query_starts[sequence + 1] - batch.query_starts[sequence]
            answers += [next_token(tokens[: length - count + i + 1]) for i in range(count)]
        self.answers = torch.tensor(answers)
        return self.logits(rows)

    def logits(self, rows: Rows) -> torch.Tensor:
        return torch.nn.functional.one_hot(self.answers[torch.from_numpy(rows)], VOCABULARY).float() * 5

    def pooled(self) -> torch.Tensor:
        raise NotImplementedError

    def routing(self) -> list[Any]:
        raise NotImplementedError

    def set_profiling(self, on: bool) -> None:
        self.profiled = on

    def take_profile(self) -> dict[str, float]:
        return {"linear": 12.5, "attention": 3.0} if self.profiled else {}


@dataclass
class Sent:
    """Stands for the outbox: what each request was sent, and under which weight versions."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    finishes: dict[int, Finish] = field(default_factory=dict)
    opened: dict[int, Opened] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    versions: dict[int, list[str]] = field(default_factory=dict)
    others: list[Any] = field(default_factory=list)

    def send(self, message: Any) -> None:
        if isinstance(message, Ended):
            assert message.key not in self.finishes
            self.finishes[message.key] = message.finish
        elif isinstance(message, StepOutput):
            for opened in message.opened:
                assert opened.key not in self.opened
                self.opened[opened.key] = opened
                self.tokens[opened.key] = list(opened.output_ids)
            for row, (key, token) in enumerate(zip(message.keys, message.tokens, strict=True)):
                assert key in self.opened and key not in self.finishes
                if message.weight_version not in self.versions.setdefault(key, []):
                    self.versions[key].append(message.weight_version)
                if token != NO_TOKEN:
                    self.tokens[key].append(token)
                if row in message.finished:
                    self.finishes[key] = message.finished[row]
                if row in message.logprobs:
                    self.logprobs.setdefault(key, []).append(message.logprobs[row])
        else:
            self.others.append(message)


def simulated_scheduler(pool: int, *, reuse: bool = True, **limits: Any) -> tuple[Scheduler, Sent, HashModel]:
    """A scheduler over `pool` slots and the fake model; `limits` are fields of `PlannerLimits`."""
    model = HashModel(pool)
    longest = min(200, pool) - 1
    scheduler, sent = scheduler_over(EagerBackend(), model, pool, longest=longest, eos_ids=[EOS], reuse=reuse, **limits)
    return scheduler, sent, model


def scheduler_over(
    backend: Backend,
    program: Program,
    pool: int,
    *,
    longest: int,
    eos_ids: list[int],
    reuse: bool = True,
    task: Task = GENERATION,
    memory: Memory | None = None,
    updates: WeightUpdates | None = None,
    queueing: QueueingProgram | None = None,
    **limits: Any,
) -> tuple[Scheduler, Sent]:
    """A scheduler over a program of a backend, without processes or sockets. memory: else a KV pool of `pool` slots."""
    sent = Sent()
    defaults: dict[str, Any] = {"prefill_budget": 16, "chunked": True, "max_running": 8}
    scheduler = Scheduler(
        settings=SchedulerSettings(
            eos_ids=eos_ids,
            longest=longest,
            max_input=longest - 5 if task.kind == "generation" else longest + 1,
            max_queued=None,
            truncate=False,
            refuse_priority=False,
            original_logprobs=False,
            waiting_timeout=None,
            running_timeout=None,
            strict=True,
            report={},
            task=task,
        ),
        planner=Planner(PlannerLimits(**(defaults | limits)), memory or KvMemory(pool, reuse=reuse)),
        runner=Runner(program, backend),
        backend=backend,
        inbox=None,  # type: ignore[arg-type]
        outbox=sent,  # type: ignore[arg-type]
        statistics=Statistics(10**9),
        updates=updates,
        queueing=queueing,
    )
    return scheduler, sent


def change_settings(scheduler: Scheduler, **changes: Any) -> None:
    scheduler.settings = scheduler.admission.settings = msgspec.structs.replace(scheduler.settings, **changes)


def answer_to(scheduler: Scheduler, sent: Any) -> None:
    """From now on all that the scheduler sends goes to `sent`."""
    parts = (scheduler, scheduler.operation, scheduler.generation, scheduler.admission, scheduler.emission)
    for part in parts:
        part.outbox = sent


def admit(
    key: int,
    prompt: list[int],
    *,
    new: int = 8,
    earlier: list[int] | None = None,
    logprobs: LogprobOptions | None = None,
    extra_key: str | None = None,
    priority: int | None = None,
    vector: VectorOptions | None = None,
    **sampling: Any,
) -> Admit:
    return Admit(
        key=key,
        attempt=0,
        rid=f"request {key}",
        input_ids=np.array(prompt, "<i4").tobytes(),
        output_ids=np.array(earlier or [], "<i4").tobytes(),
        sampling=Sampling(**({"max_new_tokens": new, "temperature": 0.0} | sampling)),
        text_options=TextOptions(),
        logprobs=logprobs,
        extra_key=extra_key,
        priority=priority,
        vector=vector,
    )


def expected_tokens(prompt: list[int], new: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def run_to_end(scheduler: Scheduler, most: int = 5_000) -> None:
    """Step until nothing is left, checking the pool after every step."""
    for _ in range(most):
        if not scheduler.requests:
            break
        scheduler.step()
        scheduler.planner.memory.check(scheduler.planner.running)
    assert not scheduler.requests, "the scheduler makes no progress"
    assert not scheduler.planner.waiting and not scheduler.planner.running
    scheduler.idle()
