"""A scheduler that dies and is born again, and a frontend that knows of it only what it was sent in time."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
from simulation import HashModel, admit, answer_to, scheduler_over

from engine.kernels.batch import RaggedBatch
from engine.kernels.eager import EagerBackend
from engine.kernels.table import Rows
from engine.wire.results import Finish
from engine.wire.to_detokenizer import NO_TOKEN, StepOutput
from engine.wire.to_frontend import Ended
from engine.wire.to_scheduler import Abort, Admit, StartOver
from scheduler_proc.answers import Answers
from scheduler_proc.scheduler import Scheduler
from scheduler_proc.weight_updates import WeightUpdates


class Cramped(HashModel):
    """Has memory for `room` tokens a step."""

    room = 10**9

    def run(self, batch: RaggedBatch, rows: Rows) -> Any:
        if batch.num_tokens > self.room:
            raise MemoryError("no room")
        return super().run(batch, rows)


class AtOnce:
    """Stands for the thread of a weight update."""

    def submit(self, work: Any, *arguments: Any) -> Future[Any]:
        job: Future[Any] = Future()
        job.set_result(work(*arguments))
        return job


class NoWeights:
    """Stands for the weights, which make no difference here."""

    serving = SimpleNamespace(source=None)
    launch = SimpleNamespace(runtime_dir="")
    moved = None

    def prepare(self, *_arguments: Any) -> None: ...

    def replace(self, *_arguments: Any) -> None: ...


@dataclass
class Entry:
    """A request in the frontend's journal. output: what has come of it so far. aborted: the scheduler was asked to."""

    message: Admit
    output: list[int] = field(default_factory=list)
    deaths: int = 0
    aborted: bool = False
    finish: Finish | None = None


@dataclass
class Lives:
    """pool, limits: of each scheduler. entries: by key. asked: the questions that have no answer. model: of the
    scheduler that lives. inbox: what it has not heard yet. at_once: messages that it hears in a turn, at most. paused:
    what it has last said of that."""

    pool: int
    limits: dict[str, Any]
    entries: dict[int, Entry] = field(default_factory=dict)
    asked: dict[int, Any] = field(default_factory=dict)
    inbox: deque[Any] = field(default_factory=deque)
    at_once: int = 10**9
    paused: bool = False
    _heard: int = 0
    _late: list[Any] = field(default_factory=list)
    _keys: int = 0

    def __post_init__(self) -> None:
        self._be_born()

    def key(self) -> int:
        self._keys += 1
        return self._keys

    def drain(self, most: int) -> list[Any]:
        messages = [self.inbox.popleft() for _ in range(min(most, len(self.inbox), self.at_once - self._heard))]
        self._heard += len(messages)
        return messages

    def send(self, message: Any) -> None:
        """The scheduler says something: it is heard after the turn, unless it dies before."""
        self._late.append(message)

    def request(self, prompt: list[int], new: int, priority: int | None = None) -> int:
        message = admit(self.key(), prompt, new=new, priority=priority, ignore_eos=True)
        self.entries[message.key] = Entry(message)
        self.inbox.append(message)
        return message.key

    def ask(self, kind: Any, **fields: Any) -> None:
        question = kind(key=self.key(), **fields)
        self.asked[question.key] = question
        self.inbox.append(question)

    def abort(self, keys: list[int]) -> None:
        for key in keys:
            self.entries[key].aborted = True
        self.inbox.append(Abort(keys))

    def turn(self) -> None:
        self._heard = 0
        self.scheduler.hear()
        self.scheduler.turn()
        self.scheduler.planner.memory.check(self.scheduler.planner.running)
        self.hear()

    def hear(self) -> None:
        said, self._late = self._late, []
        for message in said:
            self._apply(message)

    def die(self, *, suspect: bool, lost: bool) -> None:
        """The scheduler dies and another one is born. suspect: those in flight are. lost: so is what it last said."""
        if lost:
            self._late.clear()
        self.hear()
        for entry in self.entries.values():
            entry.deaths += 1
        self._be_born()
        self._start_over(suspect=suspect, paused=self.paused)

    def start_over(self) -> None:
        """Another process has died: the scheduler lives, and is asked for everything again."""
        self._start_over(suspect=False, paused=None)

    def waits_for(self) -> str:
        planner = self.scheduler.planner
        return (
            f"running {[(r.key, r.trial, r.outstanding) for r in planner.running]}, waiting "
            f"{[(r.key, r.trial, r.begun) for r in planner.waiting]}, hold {planner.hold}, asked {self.asked}"
        )

    def _be_born(self) -> None:
        self.model = Cramped(self.pool)
        updates = WeightUpdates(NoWeights(), _thread=AtOnce())  # type: ignore[arg-type]
        self.scheduler: Scheduler
        self.scheduler, _ = scheduler_over(
            EagerBackend(), self.model, self.pool, longest=self.pool - 1, eos_ids=[], updates=updates, **self.limits
        )
        scheduler = self.scheduler
        scheduler.inbox = self  # type: ignore[assignment]
        answer_to(scheduler, Answers(self))

    def _start_over(self, *, suspect: bool, paused: bool | None) -> None:
        self.inbox.clear()
        self.inbox.append(StartOver(self.key(), paused))
        again: list[Any] = [*self.asked.values()]
        for entry in [entry for entry in self.entries.values() if entry.finish is None]:
            if entry.aborted:
                entry.finish = Finish("abort", message="Aborted")
                continue
            entry.message = msgspec.structs.replace(
                entry.message,
                attempt=entry.message.attempt + 1,
                output_ids=np.array(entry.output, "<i4").tobytes(),
                suspect=entry.deaths if suspect else entry.message.suspect,
            )
            again.append(entry.message)
        self.inbox.extend(sorted(again, key=lambda message: message.key))

    def _apply(self, message: Any) -> None:
        if isinstance(message, Ended):
            self._end(message.key, message.attempt, message.finish)
        elif isinstance(message, StepOutput):
            columns = zip(message.keys, message.attempts, message.tokens, strict=True)
            for row, (key, attempt, token) in enumerate(columns):
                entry = self.entries[key]
                if token != NO_TOKEN and attempt == entry.message.attempt:
                    entry.output.append(token)
                if row in message.finished:
                    self._end(key, attempt, message.finished[row])
        else:
            self.asked.pop(getattr(message, "key", 0), None)
            self.paused = getattr(message, "paused", self.paused)

    def _end(self, key: int, attempt: int, finish: Finish) -> None:
        entry = self.entries[key]
        if attempt == entry.message.attempt:
            assert entry.finish is None
            entry.finish = finish
