"""What a request gets back: logprobs and the reason of its end."""

from __future__ import annotations

from typing import Literal

import msgspec

FLOAT32_MIN = -3.4028234663852886e38
"""Stands for a logprob of minus infinity, which JSON cannot say."""

Scored = tuple[float, int]
"""(logprob, token id)"""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Logprobs of one output position: of the sampled id, of the top ids (best first), of the ids asked for.

    `logprob` is None where no token was sampled (a request for 0 new tokens that asks for ids).
    """

    logprob: float | None
    top: list[Scored] | None = None
    ids: list[Scored] | None = None


class InputLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Logprobs of the prompt from the position asked for: parallel lists whose entry 0 has no logprob."""

    tokens: list[tuple[float | None, int]]
    top: list[list[Scored] | None] | None = None
    ids: list[list[Scored] | None] | None = None


class Finish(msgspec.Struct, frozen=True, array_like=True):
    """Why a request ended.

    kind "stop": `matched` is the token id, the stop string, or the pattern.
    kind "length": `length` is the limit that was reached.
    kind "abort": `message`, and the HTTP `status` it should be answered with (None: 200).
    """

    kind: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    length: int | None = None
    message: str | None = None
    status: int | None = None
