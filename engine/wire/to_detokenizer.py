"""Scheduler → detokenizer: one `StepOutput` a step. Replies of the scheduler to the frontend pass through here, so
that they stay in order with the tokens. The frontend sends `Detokenize` into the same inbox."""

from __future__ import annotations

import msgspec

from engine.wire.operation import Profiled, Tune
from engine.wire.results import Finish, InputLogprobs, TokenLogprobs
from engine.wire.sampling import TextOptions
from engine.wire.to_frontend import Ended, ExpertsRecorded, Failed, Flushed, StartedOver, State, Vectors
from engine.wire.weights import WeightAnswer

NO_TOKEN = -1
"""Stands in `StepOutput.tokens` for a row that ended without a new token."""


class Opened(msgspec.Struct, frozen=True, array_like=True):
    """A request whose first output is in this step.

    prompt_tail: the last few prompt ids, the context in which the output is decoded.
    output_ids: ids that an earlier attempt has delivered (their text is known to the frontend).
    rid: for messages and the log. admitted_at: `time.monotonic()` when the scheduler began to compute it.
    """

    key: int
    attempt: int
    prompt_tokens: int
    cached_tokens: int
    prompt_tail: list[int]
    output_ids: list[int]
    text_options: TextOptions
    input_logprobs: InputLogprobs | None
    rid: str = ""
    admitted_at: float = 0.0


class StepOutput(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What one step produced, in columns: row i is request `keys[i]`, attempt `attempts[i]`, new id `tokens[i]`.

    opened: requests of `keys` that appear for the first time.
    finished, logprobs: by row number, only for the rows that have one.
    retracted: key → how often it has been preempted, for the rows of requests that have been.
    weight_version: of the weights that computed the step.
    """

    opened: list[Opened]
    keys: list[int]
    attempts: list[int]
    tokens: list[int]
    finished: dict[int, Finish]
    logprobs: dict[int, TokenLogprobs]
    retracted: dict[int, int]
    weight_version: str = ""


class Detokenize(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A `/detokenize` call; answered by `to_frontend.Detokenized`."""

    key: int
    ids: list[list[int]]
    skip_special_tokens: bool


ToDetokenizer = (
    StepOutput | Detokenize | Ended | Vectors | Flushed | State | StartedOver | ExpertsRecorded | WeightAnswer
    | Profiled | Tune | Failed
)  # fmt: skip
