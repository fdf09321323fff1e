"""POST /v1/score: how likely given tokens follow a text, or how a classifier labels it (contract §3.9)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from engine.config.run import PooledFacts
from engine.wire.sampling import LogprobOptions, Sampling, TextOptions
from engine.wire.to_tokenizer import Generate
from http_frontend.amounts import check_copies, check_count
from http_frontend.bodies import SCORE, Ids, ScoreBody, decode_body
from http_frontend.errors import invalid, unreadable
from http_frontend.items import Desk, pack_ids
from http_frontend.journal import Entry, Request
from http_frontend.refusals import priority_of
from http_frontend.vectors import embed, new_rid, numbers, softmax
from http_frontend.whole_call import Work


@dataclass(frozen=True)
class _Prompt:
    text: str | None
    input_ids: bytes | None


def plan_score(body: bytes, desk: Desk) -> Work:
    """The work of a call. Raises `RefusedError`."""
    asked = decode_body(body, SCORE)
    if not asked.temperature > 0:
        raise unreadable(f"1 validation error: temperature must be greater than 0, got {asked.temperature}")
    facts = desk.run.facts
    if facts.pooled is None:
        return _plan_generation(asked, desk)
    return _plan_classifier(asked, facts.pooled, desk)


def _plan_generation(asked: ScoreBody, desk: Desk) -> Work:
    if asked.label_token_ids is None:
        raise invalid("label_token_ids is required for generation (CausalLM) models.")
    size = _count(asked)
    labels = _labels(asked.label_token_ids, size, desk.run.facts.vocab_size)
    _check_temperature(asked)
    if asked.return_pooled_hidden_states:
        raise invalid(
            "return_pooled_hidden_states is not supported for CausalLM models. It requires a model with a "
            "task-specific head (e.g. SequenceClassification or RewardModel)."
        )
    priority = priority_of(None, desk.run.server)
    messages: list[Request] = [
        Generate(
            key=desk.next_key(),
            attempt=0,
            rid=new_rid(),
            text=prompt.text,
            input_ids=prompt.input_ids,
            output_ids=b"",
            sampling=Sampling(max_new_tokens=0),
            text_options=TextOptions(),
            logprobs=LogprobOptions(ids=ids),
            priority=priority,
        )
        for prompt, ids in zip(_prompts(asked, desk.run.facts.vocab_size), labels, strict=True)
    ]

    def answer(entries: list[Entry]) -> bytes:
        rows = [_logprobs(entry) for entry in entries]
        scores = [softmax(row, asked.temperature) if asked.apply_softmax else list(map(math.exp, row)) for row in rows]
        return _body(asked, entries, scores, token_logprobs=rows if asked.return_token_logprobs else None)

    return Work(messages, answer)


def _plan_classifier(asked: ScoreBody, pooled: PooledFacts, desk: Desk) -> Work:
    if pooled.kind == "embedding":
        raise invalid(
            "This model is an embedding model and does not support /v1/score: it has neither labels nor a next token."
        )
    _count(asked)
    _check_temperature(asked)
    if asked.return_token_logprobs:
        raise invalid("return_token_logprobs is only supported for CausalLM models")
    priority = priority_of(None, desk.run.server)
    messages = [
        embed(
            desk,
            text=prompt.text,
            input_ids=prompt.input_ids,
            with_hidden=asked.return_pooled_hidden_states,
            priority=priority,
        )
        for prompt in _prompts(asked, desk.run.facts.vocab_size)
    ]

    def answer(entries: list[Entry]) -> bytes:
        rows = [numbers(entry.vector) for entry in entries]
        scores = [softmax(row, asked.temperature) for row in rows] if asked.apply_softmax else rows
        hidden = [numbers(entry.hidden) for entry in entries] if asked.return_pooled_hidden_states else None
        return _body(asked, entries, scores, pooled_hidden_states=hidden)

    return Work(messages, answer)


def _count(asked: ScoreBody) -> int:
    """How many items there are."""
    if asked.items is None:
        raise invalid("items must be provided")
    size = 1 if isinstance(asked.items, str) else len(asked.items)
    check_count("items", size)
    return size


def _labels(given: Ids, size: int, vocab_size: int) -> list[list[int]]:
    """The label ids of each item."""
    if not given:
        raise invalid("label_token_ids must be a nonempty list")
    nested = [row for row in given if isinstance(row, list)]
    if nested and len(nested) != len(given):
        raise unreadable("1 validation error: label_token_ids must be a list of ids or a list of such lists")
    if nested and len(nested) != size:
        raise invalid("label_token_ids must have one list per item")
    if not all(nested):
        raise invalid("each item must have a nonempty candidate list")
    distinct = nested or [cast(list[int], given)]
    for ids in distinct:
        if min(ids) < 0:
            raise invalid("label_token_ids must contain nonnegative integers")
        if len(set(ids)) != len(ids):
            raise invalid("label_token_ids must not contain duplicate tokens")
        if max(ids) >= vocab_size:
            wrong = next(token for token in ids if token >= vocab_size)
            raise invalid(f"Token ID {wrong} is out of vocabulary (vocab size: {vocab_size})")
    if not nested:
        check_copies("label_token_ids", len(given), size)
    return nested or distinct * size


def _check_temperature(asked: ScoreBody) -> None:
    if asked.temperature != 1 and not asked.apply_softmax:
        raise invalid("temperature requires apply_softmax=True")


def _prompts(asked: ScoreBody, vocab_size: int) -> list[_Prompt]:
    """Query and item joined, for each item. A missing query is an empty one of the items' kind."""
    items = [asked.items] if isinstance(asked.items, str) else asked.items or []
    kinds = set(map(type, items)) | ({type(asked.query)} - {type(None)})
    if len(kinds) > 1:
        raise invalid("Invalid combination of query/items types for score_request.")
    check_copies("query", len(asked.query or ""), len(items))
    query: Any = asked.query or ("" if kinds == {str} else [])
    join: Callable[[Any], Any] = lambda item: item + query if asked.item_first else query + item  # noqa: E731
    if kinds == {str}:
        return [_Prompt(join(item), None) for item in items]
    return [_Prompt(None, pack_ids(join(item), vocab_size)) for item in items]


def _logprobs(entry: Entry) -> list[float]:
    ids = entry.logprobs[-1].ids
    assert ids is not None
    return [logprob for logprob, _ in ids]


def _body(
    asked: ScoreBody,
    entries: list[Entry],
    scores: list[list[float]],
    *,
    pooled_hidden_states: list[list[float]] | None = None,
    token_logprobs: list[list[float]] | None = None,
) -> bytes:
    tokens = sum(entry.prompt_tokens for entry in entries)
    usage = {
        "prompt_tokens": tokens,
        "total_tokens": tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
        "reasoning_tokens": 0,
        "completion_tokens_details": None,
    }
    return msgspec.json.encode(
        {
            "scores": scores,
            "pooled_hidden_states": pooled_hidden_states,
            "token_logprobs": token_logprobs,
            "model": asked.model,
            "usage": usage,
            "object": "scoring",
        }
    )
