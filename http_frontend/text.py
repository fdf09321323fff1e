"""/tokenize and /detokenize (contract §3.11, §3.12)."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from engine.wire.to_detokenizer import Detokenize
from engine.wire.to_frontend import Detokenized, Tokenized
from engine.wire.to_tokenizer import Tokenize, longest_text
from http_frontend.amounts import check_count
from http_frontend.bodies import DETOKENIZE, TOKENIZE, Ids, check_content_type, check_depth, decode_body
from http_frontend.errors import RefusedError, json_response, unreadable
from http_frontend.frontend import Frontend

MOST_TEXT = 1 << 22
"""Characters of all texts of a call of `/tokenize`; ids of a call of `/detokenize`."""


class Text:
    """The handlers."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def tokenize(self, request: Request) -> Response:
        body = await request.body()
        check_content_type(request.headers.get("content-type", ""), body)
        asked = decode_body(body, TOKENIZE)
        if (asked.prompt is None) == (asked.messages is None):
            raise unreadable("1 validation error: Exactly one of 'prompt' or 'messages' must be provided.")
        check_depth(asked.messages, asked.tools, asked.chat_template_kwargs)
        _check_size(asked.prompt, longest_text(self._frontend.run.facts.context_length))
        self._frontend.check_open()
        go_on = bool(asked.continue_final_message)
        begin = asked.add_generation_prompt
        message = Tokenize(
            key=self._frontend.ring.next_key(),
            prompts=[asked.prompt] if isinstance(asked.prompt, str) else asked.prompt,
            add_special_tokens=asked.add_special_tokens is not False,
            messages=asked.messages,
            add_generation_prompt=not go_on if begin is None else begin,
            continue_final_message=go_on,
            tools=asked.tools,
            template_kwargs=asked.chat_template_kwargs or {},
        )
        answer = await self._frontend.ring.ask(message, Tokenized)
        if answer.error is not None:
            raise RefusedError("D", f"Internal server error during tokenization: {answer.error}", 500)
        counts = [len(ids) for ids in answer.ids]
        if isinstance(asked.prompt, list):
            return json_response({"tokens": answer.ids, "count": counts, "max_model_len": answer.max_model_len})
        return json_response({"tokens": answer.ids[0], "count": counts[0], "max_model_len": answer.max_model_len})

    async def detokenize(self, request: Request) -> Response:
        body = await request.body()
        check_content_type(request.headers.get("content-type", ""), body)
        asked = decode_body(body, DETOKENIZE)
        rows, nested = _rows(asked.tokens)
        check_count("tokens", len(rows))
        if (size := sum(map(len, rows))) > MOST_TEXT:
            raise unreadable(f"1 validation error: tokens: {size} ids in all; at most {MOST_TEXT}")
        vocab_size = self._frontend.run.facts.vocab_size
        wrong = next((token for row in rows for token in row if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise _undecodable(f"token id {wrong} is out of vocabulary, valid range is [0, {vocab_size})")
        self._frontend.check_open()
        message = Detokenize(self._frontend.ring.next_key(), rows, asked.skip_special_tokens)
        answer = await self._frontend.ring.ask(message, Detokenized)
        if answer.error is not None:
            if answer.bad_ids:
                raise _undecodable(answer.error)
            raise RefusedError("D", f"Internal server error during detokenization: {answer.error}", 500)
        return json_response({"text": answer.texts if nested else answer.texts[0]})


def _check_size(prompt: str | list[str] | None, longest: int) -> None:
    """Raise the refusal of more text than is tokenized at once. longest: characters that one text may have."""
    sizes = [len(text) for text in ([prompt] if isinstance(prompt, str) else prompt or [])]
    check_count("prompt", len(sizes))
    if max(sizes, default=0) > longest:
        raise unreadable(f"1 validation error: prompt: a text has {max(sizes)} characters; at most {longest}")
    if sum(sizes) > MOST_TEXT:
        raise unreadable(f"1 validation error: prompt: {sum(sizes)} characters in all; at most {MOST_TEXT}")


def _undecodable(detail: str) -> RefusedError:
    message = f"Error decoding tokens: {detail}. Input tokens might be invalid for the model."
    return RefusedError("D", message, 400, "DecodeError")


def _rows(tokens: Ids) -> tuple[list[list[int]], bool]:
    """The lists to decode, and whether the client sent a list of lists. Raises the shape C refusal of a mixture."""
    rows = [row for row in tokens if isinstance(row, list)]
    if tokens and len(rows) == len(tokens):
        return rows, True
    if rows:
        raise unreadable("1 validation error: tokens must be a list of ids or a list of such lists, not a mixture")
    return [[token for token in tokens if not isinstance(token, list)]], False
