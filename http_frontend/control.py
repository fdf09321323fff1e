"""Administrative routes: /flush_cache and /abort_request (contract §3.4, §4.1)."""

from __future__ import annotations

import logging
import math

from starlette.requests import Request
from starlette.responses import Response

from engine.wire.to_frontend import Flushed
from engine.wire.to_scheduler import FlushCache
from http_frontend.bodies import ABORT, check_content_type, decode_body
from http_frontend.errors import text_response, unreadable
from http_frontend.frontend import Frontend

log = logging.getLogger(__name__)

_REMNANTS = 1.0
"""Seconds that the scheduler gets to rid itself of requests that have just ended here (aborts, stop strings)."""

_FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)


class Control:
    """The handlers; one flush at a time."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._flushing = False

    async def flush_cache(self, request: Request) -> Response:
        timeout = _timeout(request.query_params.get("timeout"))
        if self._flushing:
            return text_response("Another flush_cache is already in progress.", 400)
        # Of a server that is paused only the scheduler knows whether requests hold on to the cache.
        if timeout == 0 and len(self._frontend.journal) and not self._frontend.paused:
            return text_response("Flush cache failed.\n", 400)
        self._flushing = True
        try:
            ring = self._frontend.ring
            flushed = await ring.ask(FlushCache(ring.next_key(), max(timeout, _REMNANTS)), Flushed)
        finally:
            self._flushing = False
        if flushed.done:
            return text_response(_FLUSHED)
        return text_response("Timed out waiting for idle state." if timeout else "Flush cache failed.\n", 400)

    async def abort_request(self, request: Request) -> Response:
        body = await request.body()
        check_content_type(request.headers.get("content-type", ""), body)
        asked = decode_body(body, ABORT)
        journal = self._frontend.journal
        if asked.abort_all:
            entries = journal.match(None)
        else:
            entries = journal.match(asked.rid) if asked.rid else []
        log.info("abort_request: rid=%r abort_all=%r matches %d requests", asked.rid, asked.abort_all, len(entries))
        journal.abort(entries)
        return Response(status_code=200)


def _timeout(word: str | None) -> float:
    """The query's timeout in seconds. Raises the shape C refusal."""
    if word is None:
        return 0.0
    try:
        seconds = float(word)
    except ValueError:
        raise unreadable(f"1 validation error: timeout must be a number of seconds, got {word!r}") from None
    if not math.isfinite(seconds) or seconds < 0:
        raise unreadable(f"1 validation error: timeout must be at least 0 and finite, got {word!r}")
    return seconds
