"""A `/generate` body becomes items, one ring message each: prompts, batches, parallel samples, ids (contract §5)."""

from __future__ import annotations

import random
import uuid
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from engine.config import RunConfig
from engine.wire.sampling import LogprobOptions, TextOptions
from engine.wire.to_tokenizer import Generate
from http_frontend.amounts import MAX_ITEMS, check_entries, check_repeated, check_rids
from http_frontend.bodies import GenerateBody, Ids, SamplingBody
from http_frontend.defaults import Asked, ask, sample_seed
from http_frontend.errors import invalid, unreadable
from http_frontend.refusals import check_features, priority_of

_INT64 = 2**63


@dataclass(frozen=True)
class Desk:
    """What admission needs to know of the server.

    next_key: numbers items. seeds: draws seeds for items without one. is_running: whether a rid is in flight.
    """

    run: RunConfig
    preferred: SamplingBody | None
    next_key: Callable[[], int]
    seeds: random.Random
    is_running: Callable[[str], bool]


@dataclass(frozen=True)
class Item:
    """One item: its message, how often its stream is fed, and the rid that the client gave for it, if any."""

    generate: Generate
    stream_interval: int
    asked_rid: str | None


@dataclass(frozen=True)
class Plan:
    """A call's items, prompt-major (sample k of prompt i is number i * n + k).

    warmers: for n > 1, per prompt the zero-token request that computes it once. many: the answer is a list.
    """

    items: list[Item]
    warmers: list[Generate]
    n: int
    many: bool


@dataclass(frozen=True)
class _Prompt:
    text: str | None
    input_ids: bytes | None

    @property
    def longest(self) -> int:
        """The most tokens that it may have, but for special ones: a token has a character at least."""
        return len(self.text or "") if self.input_ids is None else len(self.input_ids) // 4


def plan_call(body: GenerateBody, desk: Desk) -> Plan:
    """Split `body` into items. Raises `RefusedError` for what the frontend can see is wrong (contract §2.3)."""
    if not desk.run.facts.is_generation:
        raise invalid(
            "This model is an embedding model and does not support /generate. Use /encode, /classify or /v1/rerank."
        )
    prompts, batched = _prompts(body, desk)
    if not prompts:
        return Plan([], [], 1, True)
    check_features(body)
    size = len(prompts)
    asked = _ask(body, size, desk)
    n = asked[0].n
    if any(one.n != n for one in asked):
        raise invalid("The parallel_sample_num should be the same for all samples in sample params.")
    if size * n > MAX_ITEMS:
        raise invalid(f"a call may have at most {MAX_ITEMS} items, got {size} prompts times n={n}.")
    if n > 1:
        _refuse_lists(body)
    check_repeated(body, size, n)
    rids = rids_of(body.rid, size, batched, desk if n == 1 else None)
    logprobs = _logprobs(body, size, batched)
    _check_answer(prompts, asked, logprobs, desk)
    extra_keys = _extra_keys(body, size)
    priority = priority_of(body.priority, desk.run.server)

    def generate(i: int, rid: str, sampling_of: Asked, seed: int) -> Generate:
        return Generate(
            key=desk.next_key(),
            attempt=0,
            rid=rid,
            text=prompts[i].text,
            input_ids=prompts[i].input_ids,
            output_ids=b"",
            sampling=msgspec.structs.replace(sampling_of.sampling, seed=seed),
            text_options=sampling_of.text_options(body.return_text_in_logprobs),
            logprobs=logprobs[i],
            extra_key=extra_keys[i],
            priority=priority,
        )

    items, warmers = [], []
    for i, one in enumerate(asked):
        seed = desk.seeds.getrandbits(64) - _INT64 if one.seed is None else one.seed
        for k in range(n):
            rid = rids[i] if n == 1 and rids[i] is not None else uuid.uuid4().hex
            items.append(Item(generate(i, rid or "", one, sample_seed(seed, k)), one.stream_interval, rids[i]))
        if n > 1:
            warmers.append(_warmer(items[-1].generate, desk.next_key()))
    return Plan(items, warmers, n, batched or n > 1)


def _check_answer(
    prompts: list[_Prompt], asked: list[Asked], logprobs: list[LogprobOptions | None], desk: Desk
) -> None:
    """Raise `RefusedError` for logprobs that no answer could hold. Those of a single item are the tokenizer's business,
    which knows its prompt."""
    if len(prompts) * asked[0].n == 1 or not any(logprobs):
        return
    facts = desk.run.facts
    rows = zip(prompts, asked, logprobs, strict=True)
    wanted = ((one.sampling, options, prompt.longest) for prompt, one, options in rows for _ in range(one.n))
    check_entries(wanted, facts.context_length, facts.vocab_size)


def pack_ids(ids: list[int], vocab_size: int) -> bytes:
    """Token ids as int32, little-endian. Raises `RefusedError` (E7, E8, E13) for what does not fit."""
    if not ids:
        raise invalid("input_ids cannot be empty.")
    try:
        return array("i", ids).tobytes()
    except OverflowError:
        pass
    if (wide := next((token for token in ids if token >= _INT64), None)) is not None:
        raise unreadable(f"1 validation error: input_ids contains non-int64 element {wide}")
    wrong = next(token for token in ids if not 0 <= token < vocab_size)
    raise invalid(f"input_ids contains out-of-vocabulary token id {wrong}; valid range is [0, {vocab_size}).")


def _warmer(sample: Generate, key: int) -> Generate:
    """A request that computes and caches the prompt of `sample` and makes no token (contract §5.4)."""
    sampling = msgspec.structs.replace(sample.sampling, max_new_tokens=0, min_new_tokens=0, length_given=False)
    return msgspec.structs.replace(
        sample, key=key, rid=uuid.uuid4().hex, sampling=sampling, text_options=TextOptions(), logprobs=None
    )


def _prompts(body: GenerateBody, desk: Desk) -> tuple[list[_Prompt], bool]:
    """The call's prompts, and whether they came as a batch."""
    given = sum(prompt is not None for prompt in (body.text, body.input_ids, body.input_embeds))
    if given in (0, 3):
        raise invalid("Either text, input_ids or input_embeds should be provided.")
    if body.input_embeds is not None:
        if not desk.run.server.disable_radix_cache:
            raise invalid(
                "input_embeds is provided while disable_radix_cache is False. Please add `--disable-radix-cache` when "
                "you launch the server if you want to use input_embeds as inputs."
            )
        raise invalid("input_embeds is not supported yet: send text or input_ids")
    if body.input_ids is None:
        texts = [body.text] if isinstance(body.text, str) else body.text or []
        return [_Prompt(text, None) for text in texts], not isinstance(body.text, str)
    rows, nested = rows_of(
        body.input_ids, "input_ids must be a list of token ids or a list of such lists, not a mixture"
    )
    vocab_size = desk.run.facts.vocab_size
    return [_Prompt(None, pack_ids(row, vocab_size)) for row in rows], nested


def packed_prompts(input_ids: Ids, vocab_size: int) -> tuple[list[bytes], bool]:
    """The prompts of `input_ids`, packed, and whether they came as a batch. Raises `RefusedError`."""
    mixture = "input_ids must be a list of token ids or a list of such lists, not a mixture"
    rows, nested = rows_of(input_ids, mixture)
    return [pack_ids(row, vocab_size) for row in rows], nested


def rows_of(ids: Ids, mixture: str) -> tuple[list[list[int]], bool]:
    """A flat list as one row, a nested one as its rows, and which it was. Raises `RefusedError(mixture)`."""
    kinds = set(map(type, ids))
    if len(kinds) > 1:
        raise invalid(mixture)
    if kinds == {list}:
        return cast(list[list[int]], ids), True
    return [cast(list[int], ids)], False


def _spread(name: str, value: Any, size: int) -> list[Any]:
    """One value an item: a list must be long enough, anything else applies to all."""
    if not isinstance(value, list):
        return [value] * size
    if len(value) < size:
        raise invalid(f"{name} has {len(value)} entries, but the batch size is {size}.")
    return value[:size]


def _ask(body: GenerateBody, size: int, desk: Desk) -> list[Asked]:
    given = body.sampling_params
    if not isinstance(given, list):
        return [ask(given or SamplingBody(), desk.preferred, desk.run.server)] * size
    return [ask(one, desk.preferred, desk.run.server) for one in _spread("sampling_params", given, size)]


def _refuse_lists(body: GenerateBody) -> None:
    """E24: with parallel samples these must be scalars (of token ids: a flat list)."""
    names = ("return_logprob", "logprob_start_len", "top_logprobs_num", "custom_logit_processor")
    wrong = [name for name in names if isinstance(getattr(body, name), list)]
    if body.token_ids_logprob and isinstance(body.token_ids_logprob[0], list):
        wrong.append("token_ids_logprob")
    if wrong:
        raise invalid(f"Cannot use list {wrong[0]} with parallel_sample_num > 1")


def rids_of(given: str | list[str] | None, size: int, batched: bool, desk: Desk | None) -> list[str | None]:
    """The rids that the client gave, one a prompt; `desk` is None when they will not be the items' own."""
    if given is None:
        return [None] * size
    check_rids([given] if isinstance(given, str) else given)
    if isinstance(given, str):
        rids = [f"{given}_{i}" for i in range(size)] if batched else [given]
    else:
        rids = given
        if len(rids) != size:
            raise invalid("The specified rids length mismatch with the batch_size for batch processing.")
        if len(set(rids)) != size:
            twice = [rid for rid, times in Counter(rids).items() if times > 1]
            raise invalid(f"Duplicate request IDs detected within the request: {twice}")
    for rid in rids if desk else ():
        if desk and desk.is_running(rid):
            raise invalid(f"Duplicate request ID detected: {rid}")
    return list(rids)


def _logprobs(body: GenerateBody, size: int, batched: bool) -> list[LogprobOptions | None]:
    wanted = _spread("return_logprob", body.return_logprob, size)
    starts = _spread("logprob_start_len", body.logprob_start_len, size)
    tops = _spread("top_logprobs_num", body.top_logprobs_num, size)
    rows: list[list[int]] = [[]] * size
    if body.token_ids_logprob:
        flat_only = "token_ids_logprob must be a flat list of integers."
        given, nested = rows_of(body.token_ids_logprob, flat_only)
        if nested and not batched:
            raise invalid(flat_only)
        rows = _spread("token_ids_logprob", given, size) if nested else given * size
    return [
        LogprobOptions(start=-1 if start is None else start, top=top or 0, ids=ids) if want else None
        for want, start, top, ids in zip(wanted, starts, tops, rows, strict=True)
    ]


def _extra_keys(body: GenerateBody, size: int) -> list[str | None]:
    """`extra_key` and `cache_salt` as one key, so that no two different pairs are equal."""
    extras, salts = _spread("extra_key", body.extra_key, size), _spread("cache_salt", body.cache_salt, size)
    pairs = list(zip(extras, salts, strict=True))
    joined: dict[tuple[str | None, str | None], str | None] = {}
    for extra, salt in pairs:
        if (extra, salt) not in joined:
            joined[extra, salt] = msgspec.json.encode([extra or "", salt or ""]).decode() if extra or salt else None
    return [joined[pair] for pair in pairs]
