"""What a client reads of a request: the object of contract §7.1 and §7.2, whole or as a stream's chunks.

JSON is spliced from fragments: of text, ids and logprobs only what is new is encoded for each chunk, since a
cumulative stream sends everything again with each token.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from engine.wire.results import Finish
from engine.wire.to_tokenizer import Generate
from http_frontend.errors import RefusedError
from http_frontend.journal import Entry
from http_frontend.logprobs import LogprobLists
from http_frontend.timeline import timing_fields

_encode = msgspec.json.encode

DONE = b"data: [DONE]\n\n"

_LINE_ENDS = tuple((character.encode(), b"\\u%04x" % ord(character)) for character in "\u0085\u2028\u2029")

_OBJECT = (
    b'{%b%b"output_ids":[%b],%b"meta_info":{"id":%b,"finish_reason":%b,"prompt_tokens":%d,"weight_version":%b,'
    b'"num_retractions":%d,"reasoning_tokens":0,"completion_tokens":%d,"cached_tokens":%d,'
    b'"cached_tokens_details":null,"dp_rank":null%b}}'
)


class AnswerStyle(msgspec.Struct, frozen=True, kw_only=True):
    """How a call's objects look.

    with_text: false with --skip-tokenizer-init. with_prompt: add `prompt_token_ids`.
    incremental: text, ids and output logprobs are deltas. indexed: a stream of several items, so chunks carry `index`.
    weight_version: of the weights that served when the call came, for items that nothing was computed of.
    with_timeline, with_timings: what `meta_info` has of an ended item's times.
    """

    with_text: bool
    with_prompt: bool
    incremental: bool
    indexed: bool
    weight_version: str
    with_timeline: bool = False
    with_timings: bool = False


class Writer:
    """Writes the object of one entry of `/generate`, again and again as it grows; a plain answer is one call at the
    end."""

    def __init__(self, entry: Entry, style: AnswerStyle) -> None:
        generate = entry.message
        assert isinstance(generate, Generate)
        self._entry = entry
        self._style = style
        self._with_times = style.with_timeline or style.with_timings
        self._incremental = style.incremental
        self._with_text = style.with_text
        self._with_prompt = style.with_prompt
        self._open = b'"index":%d,' % entry.index if style.indexed else b""
        self._id = _encode(generate.rid)
        self._version = style.weight_version
        self._weight_version = _encode(style.weight_version)
        self._texts_seen = 0
        self._ids_seen = 0
        self._text = b""
        self._ids = b""
        self._prompt: bytes = b""
        self._first = True
        options = generate.logprobs
        with_text = generate.text_options.text_in_logprobs
        self._logprobs = LogprobLists(entry, options, with_text, style.incremental) if options else None

    def write(self) -> bytes:
        """The object as JSON, of all that has come so far.

        One long function: it runs once a token and stream, where each call costs as much as what it does.
        """
        entry = self._entry
        output_ids = entry.output_ids
        count = len(output_ids)
        if count > self._ids_seen:
            new_ids = _encode(output_ids[self._ids_seen :])[1:-1]
            self._ids = new_ids if self._incremental or not self._ids else b"%b,%b" % (self._ids, new_ids)
            self._ids_seen = count
        elif self._incremental:
            self._ids = b""
        texts = entry.texts
        if len(texts) > self._texts_seen:
            new_text = _encode("".join(texts[self._texts_seen :]))[1:-1]
            self._text = new_text if self._incremental else self._text + new_text
            self._texts_seen = len(texts)
        elif self._incremental:
            self._text = b""
        if entry.weight_version != self._version and entry.weight_version:
            self._version = entry.weight_version
            self._weight_version = _encode(entry.weight_version)
        finish = entry.finish
        extra = b"" if self._logprobs is None else self._logprobs.fields()
        if finish is not None:
            extra += b',"e2e_latency":%.6f' % (entry.finished - entry.arrived)
            if self._with_times:
                style = self._style
                extra += timing_fields(entry, with_timeline=style.with_timeline, with_timings=style.with_timings)
        if self._first:
            extra += b',"response_sent_to_client_ts":%.6f' % time.time()
            self._first = False
        return _OBJECT % (
            self._open,
            b'"text":"%b",' % self._text if self._with_text else b"",
            self._ids,
            self._prompt_field() if self._with_prompt else b"",
            self._id,
            b"null" if finish is None else _encode(finish_reason(finish)),
            entry.prompt_tokens,
            self._weight_version,
            entry.retractions,
            count,
            entry.cached_tokens,
            extra,
        )

    def event(self) -> bytes:
        """The object as an event of a stream, or the error line of an entry that was refused at the door."""
        entry = self._entry
        if entry.finish is not None and entry.origin == "door" and entry.finish.status == 400:
            return error_event(entry.finish.message or "", entry.index if self._open else None)
        return b"data: %b\n\n" % one_line(self.write())

    def _prompt_field(self) -> bytes:
        if not self._prompt and self._entry.prompt_ids:
            self._prompt = b'"prompt_token_ids":%b,' % _encode(self._entry.prompt().tolist())
        return self._prompt or b'"prompt_token_ids":[],'


def one_line(body: bytes) -> bytes:
    """`body` (JSON) with NEL, LINE SEPARATOR and PARAGRAPH SEPARATOR escaped.

    JSON may hold them as they are, but readers that split a stream by the rules of Unicode would cut an event there.
    """
    if b"\xe2\x80" in body or b"\xc2\x85" in body:
        for character, escape in _LINE_ENDS:
            body = body.replace(character, escape)
    return body


def finish_reason(finish: Finish) -> dict[str, Any]:
    """`meta_info.finish_reason` of an ended request."""
    match finish.kind:
        case "stop":
            return {"type": "stop", "matched": finish.matched}
        case "length":
            return {"type": "length", "length": finish.length}
        case "abort":
            return {"type": "abort", "message": finish.message, "status_code": finish.status, "err_type": None}


def failure(entry: Entry) -> RefusedError | None:
    """The error that a call answers for `entry` when it is not streamed; None for an ordinary answer (§7.6)."""
    finish = entry.finish
    if finish is None or finish.kind != "abort" or finish.status is None:
        return None
    message = finish.message or ""
    if finish.status == 400:
        return RefusedError("A", message)
    return RefusedError("D", message, finish.status, str(finish.status))


def error_event(message: str, index: int | None = None) -> bytes:
    """A stream's line for a request that is invalid (§7.5)."""
    error = {"message": message, "type": "invalid_request_error", "code": 400, "retryable": False}
    body = {"error": error} if index is None else {"index": index, "error": error}
    return b"data: %b\n\n" % one_line(_encode(body))


def refused_event(refused: RefusedError, rid: str, style: AnswerStyle) -> bytes:
    """A stream's only line for a call that was refused before it had items."""
    if refused.shape == "A":
        return error_event(refused.message)
    meta = {
        "id": rid,
        "finish_reason": finish_reason(Finish("abort", message=refused.message, status=refused.status)),
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "cached_tokens": 0,
        "weight_version": style.weight_version,
    }
    text = {"text": ""} if style.with_text else {}
    return b"data: %b\n\n" % one_line(_encode({**text, "output_ids": [], "meta_info": meta}))
