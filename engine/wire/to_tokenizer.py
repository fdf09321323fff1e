"""Frontend → tokenizer: requests as they came, and control messages on their way round the ring."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.wire.sampling import LogprobOptions, Sampling, TextOptions
from engine.wire.to_scheduler import Control


class Generate(msgspec.Struct, frozen=True, array_like=True, tag=True, kw_only=True):
    """One item of a `/generate` call.

    key: the frontend's number for it, never used twice; replies carry it.
    attempt: 0, and one more each time the frontend replays it after a crash.
    text, input_ids: exactly one is set; ids are int32, little-endian.
    output_ids: what an earlier attempt has already delivered (int32), to go on behind.
    suspect: at how many deaths of the scheduler it was in flight.
    probe: the server's own, to see whether it works.
    """

    key: int
    attempt: int
    rid: str
    text: str | None
    input_ids: bytes | None
    output_ids: bytes
    sampling: Sampling
    text_options: TextOptions
    logprobs: LogprobOptions | None
    extra_key: str | None = None
    priority: int | None = None
    suspect: int = 0
    probe: bool = False


class Embed(msgspec.Struct, frozen=True, array_like=True, tag=True, kw_only=True):
    """One text (or pair of texts) whose vector is wanted; answered by `to_frontend.Vectors`.

    Exactly one of text and input_ids is set. pair: the second text, where a pair is to be judged.
    """

    key: int
    attempt: int
    rid: str
    text: str | None
    pair: str | None
    input_ids: bytes | None
    dimensions: int | None = None
    with_hidden: bool = False
    priority: int | None = None
    suspect: int = 0
    probe: bool = False


class Judge(msgspec.Struct, frozen=True, array_like=True, tag=True, kw_only=True):
    """Whether `document` answers `query`, asked with the chat template of a model that says yes or no.

    Answered as a `Generate` of no new tokens is, with the logprobs of "yes" and "no", in this order.
    """

    key: int
    attempt: int
    rid: str
    query: str
    document: str
    instruct: str | None
    priority: int | None = None
    suspect: int = 0


class Tokenize(msgspec.Struct, frozen=True, array_like=True, tag=True, kw_only=True):
    """A `/tokenize` call: `prompts`, or `messages` to be rendered with the chat template.

    Answered by `to_frontend.Tokenized`.
    """

    key: int
    prompts: list[str] | None
    add_special_tokens: bool
    messages: list[dict[str, Any]] | None
    add_generation_prompt: bool
    continue_final_message: bool
    tools: list[dict[str, Any]] | None
    template_kwargs: dict[str, Any]


LONGEST_TEXT = 1 << 18


def longest_text(context_length: int) -> int:
    """Characters of one text of a `/tokenize` call: it is tokenized as a whole, and everybody else waits for that. As
    long as a prompt of a request may be, in characters."""
    return max(LONGEST_TEXT, 4 * context_length)


ToTokenizer = Generate | Embed | Judge | Tokenize | Control
