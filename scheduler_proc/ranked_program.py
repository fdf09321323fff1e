"""The program of rank 0 in a divided model: a step is told to all ranks before it is computed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from engine.kernels.batch import RaggedBatch
from engine.kernels.queued import Draws, Outcome, QueueingProgram, Scores
from engine.kernels.table import Integers, Longs, Program, Rows
from engine.parallel.group import GroupLostError
from engine.wire.to_worker import RunHead, RunStep
from scheduler_proc.ranks import Ranks


@dataclass(frozen=True)
class Bounds:
    """What a step may hold: ids below `vocabulary`, slots below `slots`, at most `tokens` tokens, positions below
    `positions`."""

    vocabulary: int
    slots: int
    tokens: int
    positions: int

    def check(self, batch: RaggedBatch, rows: Rows) -> None:
        """Raise ValueError: what one rank finds out in its step is the end of all of them."""
        if batch.num_tokens > self.tokens:
            raise ValueError(f"a step has {batch.num_tokens} tokens; ranks exchange at most {self.tokens}")
        for name, values, end in (
            ("token_ids", batch.token_ids.numpy(), self.vocabulary),
            ("positions", batch.positions.numpy(), self.positions),
            ("slots", batch.slots.numpy(), self.slots),
            ("context_slots", batch.context_slots.numpy(), self.slots),
            ("rows", rows, batch.num_tokens),
        ):
            if len(values) and not (values.min() >= 0 and values.max() < end):
                raise ValueError(
                    f"{name} of a step reach from {values.min()} to {values.max()}; allowed: 0 to {end - 1}"
                )


@dataclass(slots=True)
class RankedProgram:
    """The program of rank 0, which has the others compute with it.

    Once they have been told of a step nothing that goes wrong is this step's alone: what they hold, and how far they
    have come, is unknown. Raises GroupLostError then, whatever it was (a lack of memory too), and ValueError before.
    """

    inner: Program
    ranks: Ranks
    bounds: Bounds

    def run(self, batch: RaggedBatch, rows: Rows, keep: Longs | None = None) -> torch.Tensor:
        self.bounds.check(batch, rows)
        message = run_step(batch, rows, keep)
        with _together():
            self.ranks.tell(message)
            return self.inner.run(batch, rows, keep)

    def logits(self, rows: Rows, keep: Longs | None = None) -> torch.Tensor:
        message = RunHead(rows.tobytes(), None if keep is None else keep.tobytes())
        with _together():
            self.ranks.tell(message)
            return self.inner.logits(rows, keep)

    def pooled(self) -> torch.Tensor:
        return self.inner.pooled()

    def routing(self) -> list[Integers]:
        return self.inner.routing()

    def set_profiling(self, on: bool) -> None:
        self.inner.set_profiling(on)

    def take_profile(self) -> dict[str, float]:
        return self.inner.take_profile()


@dataclass(slots=True)
class QueueingRanks(RankedProgram):
    """The same where steps are queued, with all ranks. What one samples there are rank 0's tokens."""

    def queue(
        self, batch: RaggedBatch, rows: Rows, sources: Longs, draws: Draws | None, scores: Scores | None
    ) -> Callable[[], Outcome]:
        assert isinstance(self.inner, QueueingProgram)
        self.bounds.check(batch, rows)
        message = run_step(batch, rows, None, sources)
        with _together():
            self.ranks.tell(message)
            outcome = self.inner.queue(batch, rows, sources, draws, scores)

        def awaited() -> Outcome:
            with _together():
                return outcome()

        return awaited


def ranked(program: Program, ranks: Ranks, bounds: Bounds) -> RankedProgram:
    kind = QueueingRanks if isinstance(program, QueueingProgram) else RankedProgram
    return kind(program, ranks, bounds)


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except GroupLostError:
        raise
    except Exception as error:
        raise GroupLostError(f"rank 0 failed in a step of all ranks: {type(error).__name__}: {error}") from error


def run_step(batch: RaggedBatch, rows: Rows, keep: Longs | None, sources: Longs | None = None) -> RunStep:
    return RunStep(
        token_ids=_bytes(batch.token_ids),
        positions=_bytes(batch.positions),
        slots=_bytes(batch.slots),
        query_starts=list(batch.query_starts),
        context_lengths=list(batch.context_lengths),
        context_slots=_bytes(batch.context_slots),
        type_ids=None if batch.type_ids is None else _bytes(batch.type_ids),
        rows=rows.tobytes(),
        keep=None if keep is None else keep.tobytes(),
        sources=None if sources is None else sources.tobytes(),
    )


def _bytes(values: torch.Tensor) -> bytes:
    return values.numpy().tobytes()
