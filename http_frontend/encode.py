"""POST|PUT /encode and /classify: vectors of texts (contract §3.6, §3.7), and POST /v1/embeddings, the same in OpenAI's
shape."""

from __future__ import annotations

import base64
import time
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from engine.config.run import PooledFacts
from http_frontend.amounts import check_count
from http_frontend.answers import finish_reason
from http_frontend.bodies import EMBED, EMBEDDINGS, EmbedBody, EmbeddingsBody, decode_body
from http_frontend.errors import invalid, unreadable
from http_frontend.items import Desk, pack_ids, packed_prompts, rids_of
from http_frontend.journal import Entry
from http_frontend.refusals import priority_of, refuse_adapters, refuse_media
from http_frontend.vectors import check_dimensions, embed, numbers, pair_score, pooled_of
from http_frontend.whole_call import Work


@dataclass(frozen=True)
class _Prompt:
    text: str | None = None
    pair: str | None = None
    input_ids: bytes | None = None


def plan_encode(body: bytes, desk: Desk) -> Work:
    """The work of a call of /encode or /classify. Raises `RefusedError`."""
    asked = decode_body(body, EMBED)
    pooled = pooled_of(desk.run.facts)
    refuse_media(asked)
    prompts, batched = _prompts(asked, desk.run.facts.vocab_size)
    check_count("a call", len(prompts))
    check_dimensions(asked.dimensions, pooled, desk.run.model.name)
    refuse_adapters(asked.lora_path)
    if batched and isinstance(asked.rid, str):
        raise invalid(f"rid must be a list of {len(prompts)} strings for a batch, got a string.")
    rids = rids_of(asked.rid, len(prompts), batched, desk)
    priority = priority_of(asked.priority, desk.run.server)
    weight_version = desk.run.server.weight_version
    messages = [
        embed(
            desk,
            text=prompt.text,
            pair=prompt.pair,
            input_ids=prompt.input_ids,
            rid=rid,
            dimensions=asked.dimensions,
            with_hidden=asked.return_pooled_hidden_states,
            priority=priority,
        )
        for prompt, rid in zip(prompts, rids, strict=True)
    ]

    def answer(entries: list[Entry]) -> bytes:
        # One by one: as Python's numbers a whole batch would take several times the memory of its text.
        objects = [msgspec.json.encode(_item(entry, asked, pooled, weight_version)) for entry in entries]
        return b"[%b]" % b",".join(objects) if batched else objects[0]

    return Work(messages, answer, asked.timeout)


def _prompts(body: EmbedBody, vocab_size: int) -> tuple[list[_Prompt], bool]:
    """The call's prompts, and whether they came as a batch."""
    if body.text is None and body.input_ids is None:
        raise invalid("At least one of text, input_ids, image, video, or audio should be provided")
    if body.text is not None and body.input_ids is not None:
        raise invalid("text and input_ids cannot be provided at the same time")
    if body.input_ids is not None:
        packed, nested = packed_prompts(body.input_ids, vocab_size)
        return [_Prompt(input_ids=ids) for ids in packed], nested
    assert body.text is not None
    if body.is_cross_encoder_request:
        return _pairs(body.text)
    if isinstance(body.text, str):
        return [_Prompt(text=body.text)], False
    if any(isinstance(text, list) for text in body.text):
        raise invalid("text may hold pairs of texts only with is_cross_encoder_request: true")
    return [_Prompt(text=cast(str, text)) for text in body.text], True


def _pairs(text: str | list[str | list[str]]) -> tuple[list[_Prompt], bool]:
    """A list of pairs is a batch, and two strings are one pair."""
    single = len(text) == 2 and not isinstance(text, str) and all(isinstance(part, str) for part in text)
    pairs = [cast(list[str], text)] if single else text
    for pair in pairs if not isinstance(pairs, str) else [pairs]:
        if isinstance(pair, str) or len(pair) != 2:
            raise invalid(
                "text must be a pair of texts, [query, document], or a list of such pairs with is_cross_encoder_request"
            )
    return [_Prompt(text=pair[0], pair=pair[1]) for pair in pairs], not single


def _item(entry: Entry, asked: EmbedBody, pooled: PooledFacts, weight_version: str) -> dict[str, Any]:
    """The object of one item. An item that was aborted has no numbers."""
    assert entry.finish is not None
    embedding: list[float] | float = numbers(entry.vector)
    if asked.is_cross_encoder_request and pooled.width == 1 and entry.vector:
        embedding = pair_score(entry, pooled)
    item: dict[str, Any] = {"embedding": embedding}
    if asked.return_pooled_hidden_states:
        item["pooled_hidden_state"] = numbers(entry.hidden)
    if asked.return_prompt_token_ids:
        item["prompt_token_ids"] = entry.prompt().tolist()
    item["meta_info"] = {
        "id": entry.message.rid,
        "finish_reason": finish_reason(entry.finish),
        "prompt_tokens": entry.prompt_tokens,
        "weight_version": entry.weight_version or weight_version,
        "num_retractions": entry.retractions,
        "e2e_latency": entry.finished - entry.arrived,
        "response_sent_to_client_ts": time.time(),
    }
    return item


def plan_embeddings(body: bytes, desk: Desk) -> Work:
    """The work of a call of /v1/embeddings. Raises `RefusedError`."""
    asked = decode_body(body, EMBEDDINGS)
    prompts = _inputs(asked, desk.run.facts.vocab_size)
    pooled = pooled_of(desk.run.facts)
    check_count("input", len(prompts))
    check_dimensions(asked.dimensions, pooled, desk.run.model.name)
    priority = priority_of(None, desk.run.server)
    messages = [
        embed(
            desk, text=prompt.text, input_ids=prompt.input_ids, dimensions=asked.dimensions, priority=priority
        )
        for prompt in prompts
    ]  # fmt: skip

    def answer(entries: list[Entry]) -> bytes:
        data = [msgspec.Raw(msgspec.json.encode(_openai_item(entry, asked))) for entry in entries]
        tokens = sum(entry.prompt_tokens for entry in entries)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return msgspec.json.encode({"object": "list", "data": data, "model": asked.model, "usage": usage})

    return Work(messages, answer)


def _openai_item(entry: Entry, asked: EmbeddingsBody) -> dict[str, Any]:
    plain = asked.encoding_format == "float"
    embedding = numbers(entry.vector) if plain else base64.b64encode(entry.vector).decode()
    return {"object": "embedding", "embedding": embedding, "index": entry.index}


def _inputs(asked: EmbeddingsBody, vocab_size: int) -> list[_Prompt]:
    """One text, texts, the ids of one text, or lists of ids."""
    given = asked.input
    if not given:
        raise invalid("Input cannot be empty")
    if isinstance(given, str):
        if not given.strip():
            raise invalid("Input cannot be empty or whitespace only")
        return [_Prompt(text=given)]
    kinds = set(map(type, given))
    if len(kinds) > 1:
        raise unreadable("1 validation error: input must be texts, token ids, or lists of token ids, not a mixture")
    if kinds == {str}:
        for i, text in enumerate(cast(list[str], given)):
            if not text.strip():
                raise invalid(f"Input at index {i} cannot be empty or whitespace only")
        return [_Prompt(text=text) for text in cast(list[str], given)]
    rows = [cast(list[int], given)] if kinds == {int} else cast(list[list[int]], given)
    return [_Prompt(input_ids=pack_ids(row, vocab_size)) for row in rows]
