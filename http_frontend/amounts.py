"""How much one call may come to.

A body is bounded, but what it names once may be repeated by each of its items, and each may ask for an answer that is
far larger than the body.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engine.wire.sampling import LogprobOptions, Sampling
from http_frontend.bodies import GRAMMARS, GenerateBody, SamplingBody
from http_frontend.errors import invalid

MAX_ITEMS = 65536
"""Most items of one call (prompts times samples)."""
MOST_COPIED = 1 << 26
"""Characters in the copies of one field of a call."""
MOST_ENTRIES = 16_000_000
"""Logprob entries of all items of a call: each takes about 100 bytes in every process on its way."""
LONGEST_RID = 1024
_ID = 8
_BIAS = 16
"""Characters that an id counts for, and an entry of a logit_bias."""


def check_count(name: str, size: int) -> None:
    """Raise `RefusedError` for more items than one call may have."""
    if size > MAX_ITEMS:
        raise invalid(f"{name} may have at most {MAX_ITEMS} entries, got {size}.")


def check_copies(name: str, length: int, times: int) -> None:
    """Raise `RefusedError` where `length` characters that every item repeats come to more than memory should."""
    if length * times > MOST_COPIED and times > 1:
        raise invalid(f"{name} of length {length}, once for each of {times} items, exceeds {MOST_COPIED} in all.")


def check_rids(rids: Iterable[str | None]) -> None:
    """Raise `RefusedError` for an id that is too long: it stands in logs, and in each chunk of a stream."""
    for rid in rids:
        if rid is not None and len(rid) > LONGEST_RID:
            raise invalid(f"rid may have at most {LONGEST_RID} characters, got {len(rid)}.")


def check_repeated(body: GenerateBody, prompts: int, n: int) -> None:
    """Raise `RefusedError` where what `prompts` of `n` samples each repeat of `body` comes to more than memory should.
    Prompts themselves are the queue's business."""
    for name in ("extra_key", "cache_salt", "token_ids_logprob"):
        value = getattr(body, name)
        own = isinstance(value, list) and not (value and isinstance(value[0], int))
        check_copies(name, _length(value), n if own else n * prompts)
    params = body.sampling_params
    own = isinstance(params, list)
    listed: list[SamplingBody] = params if isinstance(params, list) else [params] if params else []
    for name in ("stop", "stop_regex", "stop_token_ids", "logit_bias", *GRAMMARS):
        length = sum(_length(getattr(one, name)) for one in listed)
        check_copies(name, length, n if own else n * prompts)


def check_entries(wanted: Iterable[tuple[Sampling, LogprobOptions | None, int]], context: int, vocab_size: int) -> None:
    """Raise `RefusedError` where the logprobs of a call's items come to more than memory should.

    wanted: of each item, with the most tokens that its prompt may have.
    """
    entries = 0
    for sampling, options, prompt in wanted:
        if options is not None:
            new = context if sampling.max_new_tokens is None else max(0, sampling.max_new_tokens)
            positions = min(context, new + (prompt if options.start >= 0 else 0))
            entries += positions * (max(0, min(options.top, vocab_size)) + len(options.ids))
    if entries > MOST_ENTRIES:
        raise invalid(f"the items of the call ask for {entries} logprob entries; at most {MOST_ENTRIES} are allowed.")


def _length(value: Any) -> int:
    """Characters or ids of a field, whatever form it has."""
    match value:
        case str():
            return len(value)
        case dict():
            return _BIAS * len(value)
        case list():
            return sum(_ID if isinstance(one, int) else _length(one) for one in value)
        case _:
            return 0
