"""What a request asks for: how to sample, what to report, how to turn ids into text."""

from __future__ import annotations

from typing import Literal

import msgspec

GrammarKind = Literal["json", "regex", "ebnf", "structural_tag"]


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """What an output must conform to. text: as the client wrote it, not empty."""

    kind: GrammarKind
    text: str


class Sampling(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Sampling parameters of one request, merged from the defaults, the server's preferred ones and its own.

    Ranges are those of the contract's §6.1; the tokenizer process checks them.

    max_new_tokens: None means as long as the context permits.
    length_given: `max_new_tokens` came with the request, so that too long a request is refused, not cut.
    logit_bias: keys are token ids as the client wrote them, in decimal.
    seed: drawn at admission when the client gave none; draws are a function of (seed, position).
    """

    max_new_tokens: int | None = 128
    length_given: bool = False
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    stop_token_ids: list[int] = []
    logit_bias: dict[str, float] | None = None
    seed: int = 0
    grammar: Grammar | None = None


class TextOptions(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """How the detokenizer turns one request's ids into text, and which texts end it.

    text_in_logprobs: also give the text of each id that a logprob entry names.
    """

    stop: list[str] = []
    stop_regex: list[str] = []
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    ignore_eos: bool = False
    text_in_logprobs: bool = False


class LogprobOptions(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Which logprobs one request wants.

    start: first prompt position to report, -1 for none.
    top: how many of the most likely ids at each position.
    ids: these ids at each position.
    """

    start: int = -1
    top: int = 0
    ids: list[int] = []
