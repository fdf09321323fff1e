"""Into the frontend: text from the detokenizer, answers of the scheduler (through the detokenizer), answers of the
tokenizer."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from engine.wire.lifecycle import FromLauncher
from engine.wire.operation import Profiled
from engine.wire.results import Finish, InputLogprobs, TokenLogprobs
from engine.wire.weights import WeightAnswer


class Accepted(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """From the tokenizer: the request is valid and on its way. `input_ids`: its prompt, int32 little-endian.

    at: `time.monotonic()` of that, a clock that all processes of a machine share; 0.0: not told.
    """

    key: int
    attempt: int
    input_ids: bytes
    at: float = 0.0


class Ended(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A request that ended before its first token, or has failed in the scheduler at any time.

    origin "door": refused by validation in the tokenizer. origin "scheduler": refused, aborted or failed there.
    (Streams show the two differently: contract §7.5.)
    """

    key: int
    attempt: int
    finish: Finish
    origin: Literal["door", "scheduler"]


class Begun(msgspec.Struct, frozen=True, array_like=True):
    """A request whose first output is in this step. `texts`: the text of each id in `input_logprobs`, if asked.

    admitted_at: `time.monotonic()` when the scheduler began to compute it; 0.0: not told.
    """

    key: int
    attempt: int
    prompt_tokens: int
    cached_tokens: int
    input_logprobs: InputLogprobs | None
    texts: dict[int, str] | None
    admitted_at: float = 0.0


class TextStep(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A step's new text and ids, in columns (row i: `keys[i]`, `attempts[i]`, `texts[i]`, `tokens[i]`).

    texts: what may be shown now; may be empty while bytes or a possible stop string are held back.
    tokens: the new id, or `to_detokenizer.NO_TOKEN`.
    finished, logprobs: by row number, only for the rows that have one.
    logprob_texts: row number → text of each id that the row's logprobs name, if asked.
    retracted: key → how often it has been preempted.
    weight_version: of the weights that computed the step.
    """

    begun: list[Begun]
    keys: list[int]
    attempts: list[int]
    texts: list[str]
    tokens: list[int]
    finished: dict[int, Finish]
    logprobs: dict[int, TokenLogprobs]
    logprob_texts: dict[int, dict[int, str]]
    retracted: dict[int, int]
    weight_version: str = ""


class Vectors(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A step's vectors: request `keys[i]`, attempt `attempts[i]`, has `widths[i]` of the entries that lie end to end in
    `entries` (float32, little-endian). Each request ends with it.

    hidden: by row number, the pooled hidden state (float32) of those that want it.
    retracted: key → how often it has been preempted.
    """

    keys: list[int]
    attempts: list[int]
    prompt_tokens: list[int]
    widths: list[int]
    entries: bytes
    hidden: dict[int, bytes]
    retracted: dict[int, int]
    weight_version: str


class Flushed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Answer to `FlushCache`; `done` is false when the scheduler was not idle in time."""

    key: int
    done: bool


class State(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Answer to `QueryState`: the scheduler's part of `/server_info`."""

    key: int
    state: dict[str, Any]


class StartedOver(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Answer to `StartOver`: no attempt at a request whose key is below `before` is left, and what is in force."""

    before: int
    paused: bool
    weight_version: str


class ExpertsRecorded(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Answer to `RecordExperts`; error: why it could not be done."""

    key: int
    error: str | None = None


class Tokenized(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Answer to `Tokenize`: ids per prompt and the tokenizer's own length limit, or the error."""

    key: int
    ids: list[list[int]]
    max_model_len: int
    error: str | None


class Detokenized(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Answer to `Detokenize`: a text per list, or the error. `bad_ids`: the ids themselves are to blame."""

    key: int
    texts: list[str]
    error: str | None
    bad_ids: bool = False


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Answer to any question that the scheduler has failed to carry out, in place of the question's own."""

    key: int
    message: str


FromRing = (
    Accepted | Ended | TextStep | Vectors | Flushed | State | StartedOver | ExpertsRecorded | WeightAnswer | Tokenized
    | Detokenized | Profiled | Failed
)  # fmt: skip
ToFrontend = FromRing | FromLauncher
