"""The logprob lists of `meta_info`, as JSON fragments that only grow (contract §7.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from engine.wire.results import Scored
from engine.wire.sampling import LogprobOptions
from http_frontend.journal import Entry

_encode = msgspec.json.encode


class GrowingList:
    """A JSON array's content: what was there, and what is new; only the new is ever encoded."""

    __slots__ = ("_incremental", "_so_far")

    def __init__(self, incremental: bool) -> None:
        self._incremental = incremental
        self._so_far = b""

    def extend(self, values: list[Any]) -> bytes:
        """Append `values` and return the content to send: all of it, or (incremental) the new part alone."""
        new = _encode(values)[1:-1]
        if self._incremental:
            return new
        if new:
            self._so_far = b"%b,%b" % (self._so_far, new) if self._so_far else new
        return self._so_far


class LogprobLists:
    """Writes the logprob fields of one entry: input lists whole each time, output lists cumulative or as deltas."""

    def __init__(self, entry: Entry, options: LogprobOptions, with_text: bool, incremental: bool) -> None:
        self._entry = entry
        self._options = options
        self._text: Callable[[int], str | None] = entry.logprob_texts.get if with_text else _no_text
        self._seen = 0
        self._input: bytes | None = None
        self._tokens = GrowingList(incremental)
        self._top = GrowingList(incremental)
        self._ids = GrowingList(incremental)

    def fields(self) -> bytes:
        """The fields as `,"name":[...]` for all rows that have come so far."""
        entry = self._entry
        rows = entry.logprobs[self._seen :]
        tokens = [
            (row.logprob, token, self._text(token))
            for row, token in zip(rows, entry.output_ids[self._seen :], strict=False)
            if row.logprob is not None
        ]
        self._seen += len(rows)
        parts = [
            self._input_fields(),
            b',"output_token_logprobs":[%b],"output_token_logprobs_length":%d'
            % (self._tokens.extend(tokens), len(entry.output_ids)),
        ]
        if self._options.top > 0:
            top = [self._scored(row.top) for row in rows if row.logprob is not None]
            parts.append(b',"output_top_logprobs":[%b]' % self._top.extend(top))
        if self._options.ids:
            ids = [self._scored(row.ids) for row in rows]
            parts.append(b',"output_token_ids_logprobs":[%b]' % self._ids.extend(ids))
        return b"".join(parts)

    def _scored(self, scored: list[Scored] | None) -> list[tuple[float, int, str | None]] | None:
        if scored is None:
            return None
        return [(logprob, token, self._text(token)) for logprob, token in scored]

    def _input_fields(self) -> bytes:
        if self._input is not None:
            return self._input
        prompt = self._entry.input_logprobs
        tokens = [(logprob, token, self._text(token)) for logprob, token in prompt.tokens] if prompt else []
        fields = b',"input_token_logprobs":%b' % _encode(tokens)
        if self._options.top > 0:
            fields += b',"input_top_logprobs":%b' % _encode(self._rows(prompt.top if prompt else None))
        if self._options.ids:
            fields += b',"input_token_ids_logprobs":%b' % _encode(self._rows(prompt.ids if prompt else None))
        if prompt is not None:
            self._input = fields
        return fields

    def _rows(self, rows: list[list[Scored] | None] | None) -> list[Any]:
        return [self._scored(row) for row in rows or []]


def _no_text(_token: int) -> None:
    return None
