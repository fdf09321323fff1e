"""Tokenizer → scheduler: validated requests, and control messages from the frontend (which pass the tokenizer
unchanged). The detokenizer sends `StopSeen` into the same inbox."""

from __future__ import annotations

from typing import Literal

import msgspec

from engine.wire.operation import OperationControl
from engine.wire.sampling import LogprobOptions, Sampling, TextOptions
from engine.wire.weights import WeightControl


class VectorOptions(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """A request that is answered by the model's vector for its prompt.

    type_ids: uint8, the segment of each prompt token; empty: all 0. dimensions: entries to keep, None for all.
    with_hidden: the pooled hidden state is wanted as well.
    """

    type_ids: bytes = b""
    dimensions: int | None = None
    with_hidden: bool = False


class Admit(msgspec.Struct, frozen=True, array_like=True, tag=True, kw_only=True):
    """A request whose fields are in range and whose prompt fits the context.

    input_ids, output_ids: int32, little-endian; the latter was delivered by an earlier attempt.
    vector: answered by `to_frontend.Vectors` instead of tokens.
    suspect: at how many deaths of the scheduler it was in flight; it is tried alone before it joins the others.
    probe: the server's own; the queue is never full for it.
    """

    key: int
    attempt: int
    rid: str
    input_ids: bytes
    output_ids: bytes
    sampling: Sampling
    text_options: TextOptions
    logprobs: LogprobOptions | None
    extra_key: str | None
    priority: int | None
    vector: VectorOptions | None = None
    suspect: int = 0
    probe: bool = False


class StartOver(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Forget every request whose key is below `before`, without an answer: what of them is still wanted follows as new
    attempts. Passes the detokenizer as `to_frontend.StartedOver`.

    paused: whether generation is to be paused from now on; None: as it is.
    """

    before: int
    paused: bool | None


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """End these requests at once; each is answered with an abort `Finish` (unknown keys are not answered)."""

    keys: list[int]


class FlushCache(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Empty the radix cache once nothing runs or waits, at most `timeout` seconds from now.

    Answered by `to_frontend.Flushed`.
    """

    key: int
    timeout: float


class QueryState(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Ask for the scheduler's state; answered by `to_frontend.State`."""

    key: int


class RecordExperts(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Start or stop recording which experts are chosen, or write what was recorded to a file.

    Answered by `to_frontend.ExpertsRecorded`. Sent only where the launch has a recorder mode.
    """

    key: int
    action: Literal["start", "stop", "dump"]


class StopSeen(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The detokenizer has ended these attempts (stop string or pattern); nothing more of them is wanted."""

    keys: list[int]
    attempts: list[int]


Control = StartOver | Abort | FlushCache | QueryState | RecordExperts | WeightControl | OperationControl
ToScheduler = Admit | Control | StopSeen
