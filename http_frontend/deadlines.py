"""How long a request may take: `timeout` in its body, else --request-timeout."""

from __future__ import annotations

import asyncio
import math

from engine.config import ServerConfig
from engine.wire.results import Finish
from http_frontend.call import Call
from http_frontend.errors import invalid
from http_frontend.journal import Journal

_LONGEST = 1e8
"""Seconds; a timer cannot be set to more, and a server does not live as long."""


def check_timeout(asked: float | None) -> None:
    """Raise `RefusedError` for a timeout that is none."""
    if asked is not None and not (asked > 0 and math.isfinite(asked)):
        raise invalid(f"timeout must be greater than 0 and finite, got {asked!r}.")


def set_deadline(
    call: Call, asked: float | None, server: ServerConfig, journal: Journal, loop: asyncio.AbstractEventLoop
) -> asyncio.TimerHandle | None:
    """End what is left of `call` with 503 when its time is over, which begins now; to be cancelled when it has ended.

    asked: the `timeout` of its body. None when it may take as long as it takes.
    """
    seconds = server.request_timeout if asked is None else asked
    if seconds is None:
        return None
    limit = "the server's --request-timeout" if asked is None else "its timeout"
    finish = Finish("abort", message=f"The request took longer than {limit} of {seconds:g} s.", status=503)
    return loop.call_later(min(seconds, _LONGEST), lambda: journal.expire(call.warmers + call.entries, finish))
