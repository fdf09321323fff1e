"""Steps that are queued on a device, one of them while the one before is computed: the host never holds the device up.

What the step before has sampled is not known to the host yet when a step is queued; the device feeds it in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from engine.kernels.batch import RaggedBatch
from engine.kernels.table import Doubles, Floats, Logprobs, Longs, Rows


@dataclass(frozen=True, slots=True)
class Draws:
    """What `Backend.draw` is asked for: columns [N]."""

    rows: Longs
    temperatures: Doubles
    top_ks: Longs
    top_ps: Doubles
    min_ps: Doubles
    uniforms: Doubles


@dataclass(frozen=True, slots=True)
class Scores:
    """What `Backend.logprobs` is asked for, of the tokens that the step samples. tops may be beyond the vocabulary."""

    rows: Longs
    temperatures: Doubles
    tops: Longs
    id_counts: Longs
    ids: Longs


class Outcome(NamedTuple):
    """What a step has made of its R rows. tokens: int64 [R]. peaks: float32 [R], the largest logit of each; where that
    is not finite the rest says nothing. width: V. logprobs: of the rows of `Scores`."""

    tokens: Longs
    peaks: Floats
    width: int
    logprobs: Logprobs | None


@runtime_checkable
class QueueingProgram(Protocol):
    """A program that can be given a step before it has done the one before."""

    def queue(
        self, batch: RaggedBatch, rows: Rows, sources: Longs, draws: Draws | None, scores: Scores | None
    ) -> Callable[[], Outcome]:
        """Queue a step and the sampling of `rows`, the best of each that `draws` does not name. Nothing waits.

        sources: int64 [T], for a token that the step queued before samples, which of its rows that is; -1 for one that
        the batch has. Returns what waits for the step and gives its outcome.
        """
        ...


@runtime_checkable
class CapturingProgram(Protocol):
    """A program that can keep steps as graphs, to launch each as one."""

    def capture(
        self, most: int, running: int, longest: int, beat: Callable[[], None] = lambda: None
    ) -> tuple[int, ...]:
        """Prepare for decodes, one token each, of up to `most` sequences. The answers are the same bits without.

        running: most rows that a step samples. longest: most tokens of a sequence. beat: called now and then. Returns
        the numbers of sequences that there are graphs for, none where there are no graphs.
        """
        ...
