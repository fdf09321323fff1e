"""Sampling parameters of one item: built-in default < `--preferred-sampling-params` < the request (contract §6.1)."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET

from engine.config import ConfigError, ServerConfig
from engine.wire.sampling import Grammar, Sampling, TextOptions
from http_frontend.bodies import GRAMMARS, SamplingBody
from http_frontend.errors import invalid

_NAMES = SamplingBody.__struct_fields__


@dataclass(frozen=True)
class Asked:
    """What one `sampling_params` object asks for, merged; the seed is None when the client gave none."""

    sampling: Sampling
    seed: int | None
    n: int
    stream_interval: int
    stop: list[str]
    stop_regex: list[str]
    skip_special_tokens: bool
    no_stop_trim: bool

    def text_options(self, text_in_logprobs: bool) -> TextOptions:
        return TextOptions(
            stop=self.stop,
            stop_regex=self.stop_regex,
            skip_special_tokens=self.skip_special_tokens,
            no_stop_trim=self.no_stop_trim,
            ignore_eos=self.sampling.ignore_eos,
            text_in_logprobs=text_in_logprobs,
        )


def read_preferred(config: ServerConfig) -> SamplingBody | None:
    """`--preferred-sampling-params` as a struct. Raises `ConfigError` when it has wrong types or unknown keys."""
    if config.preferred_sampling_params is None:
        return None
    try:
        return msgspec.convert(config.preferred_sampling_params, SamplingBody)
    except msgspec.ValidationError as error:
        raise ConfigError(f"--preferred-sampling-params: {error}") from None


def merge(request: SamplingBody, preferred: SamplingBody | None) -> SamplingBody:
    """Lay `request` over `preferred`, key by key; an explicit null of the request wins too."""
    if preferred is None:
        return request
    named = {name: value for name in _NAMES if (value := getattr(request, name)) is not UNSET}
    return msgspec.structs.replace(preferred, **named)


def ask(request: SamplingBody, preferred: SamplingBody | None, server: ServerConfig) -> Asked:
    """Merge, check what the frontend owns (§2.3: E25, E39; unsupported features), and fill in the defaults.

    Ranges are left to the tokenizer process. Raises `RefusedError`.
    """
    body = merge(request, preferred)
    _refuse_unsupported(body)
    ignore_eos = _or(body.ignore_eos, False)
    sampling = Sampling(
        max_new_tokens=_or(body.max_new_tokens, 128) if body.max_new_tokens is not None else None,
        length_given=isinstance(request.max_new_tokens, int),
        min_new_tokens=_or(body.min_new_tokens, 0),
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=_or(body.top_k, -1),
        min_p=_or(body.min_p, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        ignore_eos=ignore_eos,
        stop_token_ids=_or(body.stop_token_ids, []),
        logit_bias=_or(body.logit_bias, None) or None,
        grammar=_grammar(body),
    )
    return Asked(
        sampling=sampling,
        seed=_seed(body),
        n=_count(body),
        stream_interval=max(1, _or(body.stream_interval, server.stream_interval)),
        stop=_strings(body.stop),
        stop_regex=_strings(body.stop_regex),
        skip_special_tokens=_or(body.skip_special_tokens, True),
        no_stop_trim=_or(body.no_stop_trim, False),
    )


def sample_seed(seed: int, k: int) -> int:
    """Seed of the k-th parallel sample: `seed` itself for k = 0, else a hash of (seed, k), signed 64-bit."""
    if k == 0:
        return seed
    digest = hashlib.blake2b(struct.pack("<qq", seed, k), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _or(value: Any, default: Any) -> Any:
    return default if value is UNSET or value is None else value


def _strings(value: Any) -> list[str]:
    """A string or a list of them as a list; the empty string, which would stop everything at once, is none."""
    given = _or(value, [])
    return [text for text in ([given] if isinstance(given, str) else given) if text]


def _seed(body: SamplingBody) -> int | None:
    seed: int | None = _or(body.sampling_seed, None)
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise invalid(f"sampling_seed must be in [-2**63, 2**63 - 1], got {seed}.")
    return seed


def _count(body: SamplingBody) -> int:
    if body.n is None:
        raise invalid("n must be at least 1, got null.")
    n: int = _or(body.n, 1)
    if n < 1:
        raise invalid(f"n must be at least 1, got {n}.")
    return n


def _grammar(body: SamplingBody) -> Grammar | None:
    given = [Grammar(kind, text) for name, kind in GRAMMARS.items() if (text := _or(getattr(body, name), ""))]
    if len(given) > 1:
        raise invalid("Only one of json_schema, regex, ebnf, or structural_tag can be set.")
    return given[0] if given else None


def _refuse_unsupported(body: SamplingBody) -> None:
    width = _or(body.beam_width, 1)
    if width < 1:
        raise invalid(f"beam_width must be at least 1, got {width}.")
    if width > 1:
        raise invalid(f"beam_width must be 1 (beam search is not supported), got {width}.")
    if _or(body.watermark, None) is not None:
        raise invalid("watermark must be null: watermarks are not supported")
    if body.choice is not UNSET:
        raise invalid("choice must not be set: it is not supported")
