"""Between rank 0 of a divided model and the workers, its other ranks: what a step computes, and what they do besides.

Workers obey in the order of arrival. What has an answer is asked of all of them at once, one question at a time.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from engine.config import ModelSource
from engine.wire.operation import Tune

RANKS = "ranks"
"""Inbox of rank 0, for its workers."""


def worker_name(rank: int) -> str:
    """Inbox of a worker."""
    return f"worker{rank}"


class Join(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Map the memory in which ranks exchange parts of sums; answered by `Joined`. path: None where they are on several
    hosts, and gloo carries the parts.

    part_bytes: of each rank's part. patience: seconds that ranks wait for one another.
    """

    path: str | None
    part_bytes: int
    patience: float


class Meet(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Open the group of ranks that have a GPU each; answered by `Joined`. path: of the file that is their store; None
    where they are on several hosts, which have one.

    patience: seconds that ranks wait for one another.
    """

    path: str | None
    patience: float


class Begin(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The model of all ranks fits: read the weights, and allocate so many slots. Answered by `Loaded`."""

    slots: int


class RunStep(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Compute a step. The fields are those of a `RaggedBatch`, and what `Program.run` takes; tensors as int64 bytes.

    sources: for a step that is to be queued, what `QueueingProgram.queue` takes.
    """

    token_ids: bytes
    positions: bytes
    slots: bytes
    query_starts: list[int]
    context_lengths: list[int]
    context_slots: bytes
    type_ids: bytes | None
    rows: bytes
    keep: bytes | None
    sources: bytes | None = None


class RunHead(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Compute other rows of the last step (`Program.logits`); int64 bytes."""

    rows: bytes
    keep: bytes | None


class ReplaceWeights(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Overwrite the weights with those of a checkpoint that rank 0 has found fit; answered by `Replaced`."""

    source: ModelSource


class RevertWeights(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Take the weights before the last `ReplaceWeights` back, if that has been obeyed, since another rank could not
    obey. Answered by `Replaced`."""

    reason: str


class ReadPart(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What is held of the first `rows` rows of a tensor; answered by `HeldPart`."""

    name: str
    rows: int


class RecordPart(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Start or stop recording which experts are chosen, or write it to a file; answered by `Recorded`."""

    action: Literal["start", "stop", "dump"]


ToWorker = Join | Meet | Begin | RunStep | RunHead | ReplaceWeights | RevertWeights | ReadPart | RecordPart | Tune


class Joined(msgspec.Struct, frozen=True, array_like=True, tag=True):
    rank: int


class Measured(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What a rank's part needs, told before it is filled: bytes of its weights, and of a token in its KV pool; and what
    was free on its host, or on its GPU."""

    rank: int
    weight_bytes: int
    token_bytes: int
    available: int


class Loaded(msgspec.Struct, frozen=True, array_like=True, tag=True):
    rank: int


class Replaced(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """refusal: why the weights before are in force (again), in the words of `RefusedUpdateError`; None: the new ones
    are, or after `RevertWeights` the old ones."""

    rank: int
    refusal: str | None = None


class HeldPart(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """start: the first row that is held. shape, values: of the rows, float32 bytes."""

    rank: int
    start: int
    shape: list[int]
    values: bytes


class Recorded(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """error: why it could not be done."""

    rank: int
    error: str | None = None


FromWorker = Joined | Measured | Loaded | Replaced | HeldPart | Recorded
