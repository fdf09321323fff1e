"""POST|PUT /v1/rerank: documents in the order in which they answer a query (contract §3.8).

Each document is an item of its own: a pair of texts for a model that judges pairs, or a question with the answers yes
and no for a model that generates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec

from engine.wire.to_tokenizer import Judge
from http_frontend.amounts import check_copies, check_count
from http_frontend.bodies import RERANK, RerankBody, decode_body
from http_frontend.errors import invalid, unreadable
from http_frontend.items import Desk
from http_frontend.journal import Entry, Request
from http_frontend.refusals import priority_of
from http_frontend.vectors import embed, new_rid, pair_score, pooled_of, sigmoid
from http_frontend.whole_call import Work


def plan_rerank(body: bytes, desk: Desk) -> Work:
    """The work of a call. Raises `RefusedError`."""
    asked = decode_body(body, RERANK)
    _check(asked)
    messages, score = _judged(asked, desk) if desk.run.facts.is_generation else _paired(asked, desk)

    def answer(entries: list[Entry]) -> bytes:
        scored = [(score(entry), i) for i, entry in enumerate(entries)]
        # What is no number (the model's fault) comes last; equal scores keep the request's order.
        scored.sort(key=lambda one: math.inf if math.isnan(one[0]) else -one[0])
        return msgspec.json.encode([_result(asked, entries[i], i, value) for value, i in scored[: asked.top_n]])

    return Work(messages, answer)


def _check(asked: RerankBody) -> None:
    if asked.top_n is not None and asked.top_n < 1:
        raise unreadable(f"1 validation error: parameter top_n should be larger than 0. Got {asked.top_n}.")
    if not asked.query:
        raise invalid("Query cannot be empty")
    if not asked.query.strip():
        raise invalid("Query cannot be empty or whitespace only")
    if not asked.documents:
        raise invalid("Documents cannot be empty")
    for document in asked.documents:
        if not document:
            raise invalid("Each document must be a non-empty string")
        if not document.strip():
            raise invalid("Each document cannot be empty or whitespace only")
    check_count("documents", len(asked.documents))
    check_copies("query", len(asked.query), len(asked.documents))
    check_copies("instruct", len(asked.instruct or ""), len(asked.documents))


def _paired(asked: RerankBody, desk: Desk) -> tuple[list[Request], Callable[[Entry], float]]:
    pooled = pooled_of(desk.run.facts)
    if desk.run.facts.judges and pooled.kind == "embedding":
        raise invalid(
            "Detected Qwen3 reranker chat template, but the server is not in generation mode. Please relaunch without "
            "--is-embedding for Qwen3-Reranker models."
        )
    priority = priority_of(None, desk.run.server)
    messages: list[Request] = [
        embed(desk, text=asked.query, pair=document, priority=priority) for document in asked.documents
    ]
    return messages, lambda entry: pair_score(entry, pooled)


def _judged(asked: RerankBody, desk: Desk) -> tuple[list[Request], Callable[[Entry], float]]:
    if not desk.run.facts.judges:
        pooled_of(desk.run.facts)
    priority = priority_of(None, desk.run.server)
    messages: list[Request] = [
        Judge(
            key=desk.next_key(),
            attempt=0,
            rid=new_rid(),
            query=asked.query,
            document=document,
            instruct=asked.instruct,
            priority=priority,
        )
        for document in asked.documents
    ]
    return messages, _yes


def _yes(entry: Entry) -> float:
    """p(yes) / (p(yes) + p(no)) of a `Judge` that has ended."""
    ids = entry.logprobs[-1].ids
    assert ids is not None
    (yes, _), (no, _) = ids
    return sigmoid(yes - no)


def _result(asked: RerankBody, entry: Entry, index: int, score: float) -> dict[str, Any]:
    document = {"document": asked.documents[index]} if asked.return_documents else {}
    meta = {"id": entry.message.rid, "prompt_tokens": entry.prompt_tokens}
    return {"score": score, **document, "index": index, "meta_info": meta}
