"""A call whose answer cannot be written: it ends alone, and the log names its requests."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from http_frontend.answers import DONE, AnswerStyle, refused_event
from http_frontend.bodies import Receive
from http_frontend.call import Scope, Send, send_last
from http_frontend.errors import RefusedError, text_response

log = logging.getLogger(__name__)

INTERNAL_ERROR = "Internal Server Error"


async def send_broken(error: Exception, rids: Iterable[str], scope: Scope, receive: Receive, send: Send) -> None:
    """The whole answer of a call of which nothing has been sent. Logs `error`."""
    _log(error, rids)
    await text_response(INTERNAL_ERROR, 500)(scope, receive, send)


async def end_broken(error: Exception, rids: Iterable[str], style: AnswerStyle, send: Send) -> None:
    """The last event of a stream that has begun. Logs `error`."""
    rids = list(rids)
    _log(error, rids)
    refused = RefusedError("D", f"{INTERNAL_ERROR} (request {', '.join(rids)})", 500)
    await send_last(send, refused_event(refused, rids[0] if rids else "", style) + DONE)


def _log(error: Exception, rids: Iterable[str]) -> None:
    log.error("Request %s failed: its answer cannot be written", ", ".join(rids), exc_info=error)
