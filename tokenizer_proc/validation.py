"""What a request may ask for: the contract's ranges and messages (§2.3, §5.3, §6.1).

Every check raises `RefusalError` with the message that the client gets.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import Literal

import msgspec

from engine.wire.sampling import Grammar, LogprobOptions, Sampling, TextOptions
from tokenizer_proc.stop_patterns import pattern_error

MAX_STOPS = 32
MAX_PATTERN_BYTES = 256
RESERVED_TOKENS = 7
"""A prompt may have at most context length - 7 tokens: fewer than max_req_input_len, context length - 6 (E16)."""

MOST_LOGPROB_ENTRIES = 4_000_000
"""Logprob entries of one request, over all positions: each takes about 100 bytes in every process on its way."""

_MAX_DIGITS = 19
"""Longer decimal numbers do not fit 64 bits."""


class RefusalError(Exception):
    """A request that is answered with 400. origin: how a stream shows it (`to_frontend.Ended`)."""

    def __init__(self, message: str, origin: Literal["door", "scheduler"] = "door") -> None:
        super().__init__(message)
        self.origin = origin


@dataclass(frozen=True)
class Bounds:
    """What of the server the checks depend on.

    max_new_tokens_limit: SGLANG_MAX_NEW_TOKENS_LIMIT, a cap on every request. has_tokenizer: False with
    --skip-tokenizer-init. segments: kinds of segments that the model tells apart. grammars: False with
    --grammar-backend none.
    """

    vocab_size: int
    context_length: int
    auto_truncate: bool = False
    max_new_tokens_limit: int | None = None
    has_tokenizer: bool = True
    segments: int = 0
    grammars: bool = True


def check_ids(ids: array[int], vocab_size: int) -> None:
    """E8, E13, E17."""
    if not ids:
        raise RefusalError("input_ids cannot be empty.")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise RefusalError(f"input_ids contains out-of-vocabulary token id {wrong}; valid range is [0, {vocab_size}).")


def check_sampling(sampling: Sampling, vocab_size: int) -> None:
    """The numeric ranges of §6.1."""
    s = sampling
    if not (math.isfinite(s.temperature) and s.temperature >= 0):
        raise RefusalError(f"temperature must be a non-negative finite number, got {s.temperature}.")
    if not 0 < s.top_p <= 1:
        raise RefusalError(f"top_p must be in (0, 1], got {s.top_p}.")
    if not 0 <= s.min_p <= 1:
        raise RefusalError(f"min_p must be in [0, 1], got {s.min_p}.")
    if s.top_k < 1 and s.top_k != -1:
        raise RefusalError(f"top_k must be -1 (disable) or at least 1, got {s.top_k}.")
    if not -2 <= s.frequency_penalty <= 2:
        raise RefusalError(f"frequency_penalty must be in [-2, 2], got {s.frequency_penalty}.")
    if not -2 <= s.presence_penalty <= 2:
        raise RefusalError(f"presence_penalty must be in [-2, 2], got {s.presence_penalty}.")
    if not 0 < s.repetition_penalty <= 2:
        raise RefusalError(f"repetition_penalty must be in (0, 2] (1.0 = no penalty), got {s.repetition_penalty}.")
    if s.min_new_tokens < 0:
        raise RefusalError(f"min_new_tokens must be in [0, max_new_tokens], got {s.min_new_tokens}.")
    if s.max_new_tokens is not None:
        if s.max_new_tokens < 0:
            raise RefusalError(f"max_new_tokens must be at least 0, got {s.max_new_tokens}.")
        if s.min_new_tokens > s.max_new_tokens:
            raise RefusalError(
                f"min_new_tokens must be in [0, max_new_tokens({s.max_new_tokens})], got {s.min_new_tokens}."
            )
    _check_logit_bias(s.logit_bias, vocab_size)


def _check_logit_bias(bias: dict[str, float] | None, vocab_size: int) -> None:
    for key, value in (bias or {}).items():
        number = key.removeprefix("-")
        is_number = number.isascii() and number.isdigit() and len(number) <= _MAX_DIGITS
        if not is_number or not 0 <= int(key) < vocab_size:
            raise RefusalError(f"logit_bias must has keys in [0, {vocab_size - 1}], got {key}.")
        if not math.isfinite(value):
            raise RefusalError(f"logit_bias must have finite values, got {value} for {key}.")


def check_stops(options: TextOptions, sampling: Sampling, has_tokenizer: bool) -> None:
    """The stop strings and patterns of §6.1, E42, and what cannot be had without a tokenizer."""
    if len(options.stop) > MAX_STOPS:
        raise RefusalError(f"at most {MAX_STOPS} stop strings are allowed, got {len(options.stop)}")
    if len(options.stop_regex) > MAX_STOPS:
        raise RefusalError(f"at most {MAX_STOPS} stop_regex patterns are allowed, got {len(options.stop_regex)}")
    for pattern in options.stop_regex:
        size = len(pattern.encode("utf-8", "surrogatepass"))
        if size > MAX_PATTERN_BYTES:
            raise RefusalError(f"stop_regex is {size} bytes, over the {MAX_PATTERN_BYTES}-byte limit")
    if not has_tokenizer:
        _refuse_without_tokenizer(options, sampling)
    for pattern in options.stop_regex:
        detail = pattern_error(pattern)
        if detail is not None:
            raise RefusalError(f"invalid stop_regex {pattern!r}: {detail}")


def _refuse_without_tokenizer(options: TextOptions, sampling: Sampling) -> None:
    needs = "(requires tokenizer to decode tokens to text for matching)"
    if options.stop:
        raise RefusalError(f"stop={options.stop} is unavailable when skip_tokenizer_init=True {needs}.")
    if options.stop_regex:
        raise RefusalError(f"stop_regex={options.stop_regex} is unavailable when skip_tokenizer_init=True {needs}.")
    if sampling.min_new_tokens > 0:
        raise RefusalError(
            f"min_new_tokens={sampling.min_new_tokens} is unavailable when skip_tokenizer_init=True "
            "(requires tokenizer to know its EOS token)."
        )


def check_grammar(grammar: Grammar | None, bounds: Bounds) -> None:
    """E41, and what can be seen of a grammar without compiling it."""
    if grammar is None:
        return
    if not bounds.grammars:
        raise RefusalError(
            "Grammar-based generation (json_schema, regex, ebnf, structural_tag) is not supported when the server is "
            "launched with --grammar-backend none",
            origin="scheduler",
        )
    if not bounds.has_tokenizer:
        field = "json_schema" if grammar.kind == "json" else grammar.kind
        raise RefusalError(
            f"{field} is unavailable when skip_tokenizer_init=True (requires tokenizer to know the text of tokens).",
            origin="scheduler",
        )
    if "\0" in grammar.text:
        raise RefusalError(f"Invalid {grammar.kind}: NUL bytes (\\u0000) are not allowed", origin="scheduler")


def check_logprobs(options: LogprobOptions, prompt_tokens: int, new_tokens: int, vocab_size: int) -> None:
    """E26, E27, E28, the range of top_logprobs_num, and how much all that may come to.

    new_tokens: most output tokens that the request can get.
    """
    if options.start < -1:
        raise RefusalError(f"logprob_start_len must be in [-1, {prompt_tokens}], got {options.start}.")
    if not 0 <= options.top <= vocab_size:
        raise RefusalError(f"top_logprobs_num must be in [0, {vocab_size}], got {options.top}.")
    for token in options.ids:
        if not 0 <= token < vocab_size:
            raise RefusalError(
                f"token_ids_logprob contains out-of-vocabulary token id {token}; valid range is [0, {vocab_size})."
            )
    if options.start > prompt_tokens:
        raise RefusalError(
            f"req.logprob_start_len={options.start} is higher than the number of input tokens "
            f"len(req.origin_input_ids)={prompt_tokens}. Please use a smaller logprob_start_len.",
            origin="scheduler",
        )
    positions = new_tokens + (prompt_tokens - options.start if options.start >= 0 else 0)
    entries = positions * (options.top + len(options.ids))
    if entries > MOST_LOGPROB_ENTRIES:
        raise RefusalError(
            f"top_logprobs_num={options.top} and {len(options.ids)} token_ids_logprob over {positions} positions "
            f"ask for {entries} entries; at most {MOST_LOGPROB_ENTRIES} are allowed."
        )


def cap_lengths(sampling: Sampling, limit: int | None) -> Sampling:
    """Lower `max_new_tokens` (and `min_new_tokens` with it) to the operator's limit."""
    if limit is None or (sampling.max_new_tokens is not None and sampling.max_new_tokens <= limit):
        return sampling
    return msgspec.structs.replace(
        sampling, max_new_tokens=limit, min_new_tokens=min(sampling.min_new_tokens, limit)
    )  # fmt: skip


def too_long(prompt_tokens: int, context: int) -> RefusalError:
    """E14."""
    return RefusalError(
        f"The input ({prompt_tokens} tokens) is longer than the model's context length ({context} tokens)."
    )


def fit_context(prompt_tokens: int, sampling: Sampling, bounds: Bounds) -> tuple[int, Sampling, list[str]]:
    """E14 and E15, or with --allow-auto-truncate the cuts that avoid them.

    Returns how many prompt tokens to keep, the sampling parameters, and what was cut, for the log. (The default of
    `max_new_tokens` and a small KV pool are the scheduler's to reckon with.)
    """
    context, cuts = bounds.context_length, []
    if bounds.auto_truncate:
        most = max(1, context - RESERVED_TOKENS)
        if prompt_tokens > most:
            cuts.append(f"the prompt was cut from {prompt_tokens} to {most} tokens")
            prompt_tokens = most
    elif prompt_tokens >= context:
        raise too_long(prompt_tokens, context)
    asked = sampling.max_new_tokens
    if not sampling.length_given or asked is None or prompt_tokens + asked <= context:
        return prompt_tokens, sampling, cuts
    if not bounds.auto_truncate:
        raise RefusalError(
            f"Requested token count exceeds the model's maximum context length of {context} tokens. You requested a "
            f"total of {prompt_tokens + asked} tokens: {prompt_tokens} tokens from the input messages and {asked} "
            "tokens for the completion. Please reduce the number of tokens in the input messages or the completion to "
            "fit within the limit."
        )
    room = max(0, context - prompt_tokens)
    cuts.append(f"max_new_tokens was cut from {asked} to {room}")
    shortened = msgspec.structs.replace(
        sampling, max_new_tokens=room, min_new_tokens=min(sampling.min_new_tokens, room)
    )  # fmt: skip
    return prompt_tokens, shortened, cuts
