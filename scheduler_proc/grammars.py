"""Grammars on their way from a request's text to its constraint: compiled in threads beside the steps, and kept."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Protocol

from engine.wire.failures import is_failure
from engine.wire.sampling import Grammar
from scheduler_proc.constraint import Constraint, GrammarError
from scheduler_proc.request import Request

THREADS = 2
"""Grammars that are compiled at once."""
MOST_LOST = 8
"""Threads whose grammar has run out of time are given up, and replaced up to so many times."""
KEPT = 128
KEPT_CHARACTERS = 4_000_000
"""Compiled grammars that are kept, the most recently used ones, and how long their texts may be together."""


class Engine(Protocol):
    def compile(self, grammar: Grammar, deadline: float) -> Constraint:
        """deadline: by `time.monotonic()`. Raises GrammarError, and TimeoutError when it has passed."""
        ...


@dataclass(eq=False, slots=True)
class Job:
    """One request's grammar. earlier: output of an attempt before. outcome: None until there is one."""

    request: Request
    grammar: Grammar
    earlier: list[int]
    deadline: float
    running: bool = False
    outcome: Constraint | BaseException | None = None


@dataclass(slots=True)
class Grammars:
    """open_engine: called once, in a thread, when the first grammar comes. patience: seconds until one has to be
    compiled; pauses of the scheduler count, since compiling goes on.

    Only the threads wait for a grammar; every method returns at once. jobs: of requests that wait.
    """

    open_engine: Callable[[], Engine]
    patience: float
    jobs: list[Job] = field(default_factory=list)
    _threads: int = 0
    _lost: int = 0
    _engine: Engine | None = None
    _kept: OrderedDict[Grammar, Constraint] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _opening: threading.Lock = field(default_factory=threading.Lock)
    _todo: SimpleQueue[Job] = field(default_factory=SimpleQueue)
    _done: SimpleQueue[Job] = field(default_factory=SimpleQueue)

    def begin(self, request: Request) -> None:
        """Give `request` its constraint, at once or (`collect`) later."""
        grammar = request.admit.sampling.grammar
        assert grammar is not None
        earlier = request.known[request.prompt_length :].tolist()
        if not earlier and (found := self._fresh(grammar)) is not None:
            request.constraint = found
            return
        job = Job(request, grammar, earlier, time.monotonic() + self.patience)
        self.jobs.append(job)
        self._todo.put(job)
        if self._threads < min(THREADS, len(self.jobs)):
            self._start_thread()

    def collect(self) -> list[tuple[Request, BaseException | None]]:
        """Who need not wait any longer: it has its constraint, or an error that ends it."""
        if not self.jobs:
            return []
        ready: list[tuple[Request, BaseException | None]] = []
        while True:
            try:
                job = self._done.get_nowait()
            except Empty:
                break
            if job not in self.jobs:
                continue  # it came too late
            self.jobs.remove(job)
            if isinstance(job.outcome, Constraint):
                job.request.constraint = job.outcome
                ready.append((job.request, None))
            else:
                ready.append((job.request, job.outcome))
        return ready + [(job.request, self._give_up(job)) for job in self._overdue()]

    def flush(self) -> None:
        """Forget the compiled grammars."""
        with self._lock:
            self._kept.clear()

    def _overdue(self) -> list[Job]:
        now = time.monotonic()
        return [job for job in self.jobs if now >= job.deadline]

    def _give_up(self, job: Job) -> GrammarError:
        self.jobs.remove(job)
        if job.running and self._lost < MOST_LOST:
            self._lost += 1
            self._start_thread()
        return self._too_slow(job)

    def _too_slow(self, job: Job) -> GrammarError:
        return GrammarError(
            f"Grammar preprocessing timed out: the {job.grammar.kind} grammar was not compiled in {self.patience:g} s"
        )

    def _start_thread(self) -> None:
        self._threads += 1
        threading.Thread(target=self._work, name="grammars", daemon=True).start()

    def _work(self) -> None:
        while True:
            job = self._todo.get()
            if time.monotonic() >= job.deadline:
                continue
            job.running = True
            try:
                job.outcome = self._constraint(job)
            except TimeoutError:
                job.outcome = self._too_slow(job)
            except BaseException as error:
                if not is_failure(error):
                    raise
                job.outcome = error
            job.running = False
            self._done.put(job)

    def _constraint(self, job: Job) -> Constraint:
        constraint = self._fresh(job.grammar) or self._compiled(job.grammar, job.deadline)
        constraint.advance(job.earlier)
        return constraint

    def _compiled(self, grammar: Grammar, deadline: float) -> Constraint:
        with self._opening:
            engine = self._engine = self._engine or self.open_engine()
        constraint = engine.compile(grammar, deadline)
        with self._lock:
            self._kept[grammar] = constraint
            while len(self._kept) > KEPT or sum(len(kept.text) for kept in self._kept) > KEPT_CHARACTERS:
                self._kept.popitem(last=False)
            return constraint.copy()

    def _fresh(self, grammar: Grammar) -> Constraint | None:
        """One at its beginning, of a grammar that is kept."""
        with self._lock:
            kept = self._kept.get(grammar)
            if kept is None:
                return None
            self._kept.move_to_end(grammar)
            return kept.copy()
