"""One `Judge`: the chat template asks whether a document answers a query, and the logprobs of "yes" and "no" are the
answer."""

from __future__ import annotations

import dataclasses
import logging
from array import array

from engine.checkpoints.chat_template import ChatTemplateError, render_chat
from engine.checkpoints.tokenizer import Tokenizer, encode
from engine.wire.sampling import LogprobOptions, Sampling, TextOptions
from engine.wire.to_tokenizer import Generate, Judge
from tokenizer_proc.long_texts import within_reach
from tokenizer_proc.prompt_ids import need, pack
from tokenizer_proc.validation import RESERVED_TOKENS, Bounds, RefusalError

logger = logging.getLogger(__name__)

_MOST_CUTS = 8
"""Ends of a document are cut off at most so often: a shorter text may have more tokens than its tokens suggest."""


def question(message: Judge, tokenizer: Tokenizer | None, bounds: Bounds) -> Generate:
    """The request of no new tokens that `message` stands for. Raises RefusalError."""
    tokenizer = need(tokenizer)
    document = within_reach(tokenizer, message.document, bounds)
    within_reach(tokenizer, message.query, dataclasses.replace(bounds, auto_truncate=False))
    ids = _fitting(
        message, document, tokenizer, bounds.context_length - RESERVED_TOKENS if bounds.auto_truncate else None
    )
    return Generate(
        key=message.key,
        attempt=message.attempt,
        rid=message.rid,
        text=None,
        input_ids=pack(array("i", ids)),
        output_ids=b"",
        sampling=Sampling(max_new_tokens=0),
        text_options=TextOptions(),
        logprobs=LogprobOptions(ids=[_answer_id(tokenizer, word) for word in ("yes", "no")]),
        priority=message.priority,
        suspect=message.suspect,
    )


def _fitting(message: Judge, document: str, tokenizer: Tokenizer, most: int | None) -> list[int]:
    """The prompt's ids; when there are more than `most`, the document loses its end, and the question stays whole.

    Raises RefusalError where that is not enough.
    """
    ids = _prompt_ids(message, document, tokenizer)
    for _ in range(_MOST_CUTS):
        if most is None or len(ids) <= most or not document:
            break
        encoding = tokenizer.backend.encode(document, add_special_tokens=False)
        kept = max(0, len(encoding.ids) - (len(ids) - most))
        document = document[: encoding.offsets[kept][0]] if kept < len(encoding.ids) else document[:-1]
        logger.warning("request %s: the document was cut to %d characters", message.rid, len(document))
        ids = _prompt_ids(message, document, tokenizer)
    if most is not None and len(ids) > most:
        raise RefusalError(
            f"The query and the chat template take {len(ids)} tokens without the document; at most {most} are allowed."
        )
    return ids


def _prompt_ids(message: Judge, document: str, tokenizer: Tokenizer) -> list[int]:
    """Templates find the texts by a message's place, by its role, or under a name; no instruction means their own."""
    messages = [{"role": "query", "content": message.query}, {"role": "document", "content": document}]
    named = {"query": message.query, "document": document}
    if message.instruct is not None:
        messages.append({"role": "system", "content": message.instruct})
        named |= {"instruct": message.instruct, "instruction": message.instruct}
    try:
        text = render_chat(tokenizer, messages, add_generation_prompt=True, template_kwargs=named)
    except ChatTemplateError as error:
        raise RefusalError(str(error)) from error
    return encode(tokenizer, text, add_special_tokens=False)


def _answer_id(tokenizer: Tokenizer, word: str) -> int:
    token = tokenizer.backend.token_to_id(word)
    if token is not None:
        return int(token)
    ids = encode(tokenizer, word, add_special_tokens=False)
    if len(ids) != 1:
        raise RefusalError(
            f'"{word}" must be one token for this model to judge documents; its tokenizer makes {len(ids)} of it'
        )
    return ids[0]
