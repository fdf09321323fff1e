"""What the HTTP layer refuses before a route sees it: bodies that are too large, and more calls than can be answered.

Plain ASGI. A call that passes is only counted; a body's bytes are counted as they come where they were not declared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.config import ServerConfig
from http_frontend.auth import ADMIN_PATHS, OPEN_PREFIXES
from http_frontend.errors import RefusedError, error_response

BODIES = 8
"""The bodies of all calls that are being answered may come to so many times --max-body-bytes."""
SMALL_BODY = 64 << 10
"""Bytes that are counted as soon as they are declared. Of a larger body those count that have come: to declare much and
send nothing would take everybody else's place."""
_READ_ONLY = frozenset({"GET", "HEAD", "OPTIONS"})


class Guard:
    """The limits around `app`. `path_of` gives a request's path without the root path.

    calls: that are being answered. held: bytes of their bodies.
    """

    def __init__(self, app: ASGIApp, *, server: ServerConfig, path_of: Callable[[Any], str]) -> None:
        self._app = app
        self._largest = server.max_body_bytes
        self._most_calls = server.max_open_streams
        self._path_of = path_of
        self.calls = 0
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        counts = scope["method"] not in _READ_ONLY
        body = _Body(self, receive)
        declared = _declared_length(scope)
        try:
            if counts and _is_limited(self._path_of(scope)) and self.calls >= self._most_calls:
                raise RefusedError(
                    "D", f"The server answers {self._most_calls} calls at once, and as many are open.", 503
                )
            if declared is not None:
                self.check_size(declared)
                if declared <= SMALL_BODY:
                    body.take(declared)
        except RefusedError as refused:
            body.free()
            await error_response(refused)(scope, receive, send)
            return
        self.calls += counts
        try:
            await self._app(scope, receive if body.size == declared else body.receive, send)
        finally:
            self.calls -= counts
            body.free()

    def check_size(self, total: int) -> None:
        """Raise the `RefusedError` of a body of `total` bytes that is too large."""
        if total > self._largest:
            raise RefusedError("D", f"The body has more than {self._largest} bytes, the most that are accepted.", 413)

    def reserve(self, size: int) -> None:
        """Room for `size` more bytes. Raises `RefusedError`."""
        if self.held + size > BODIES * self._largest:
            raise RefusedError("D", "The bodies of the requests in flight take all the memory that is for them.", 503)
        self.held += size


class _Body:
    """The bytes of one body."""

    def __init__(self, guard: Guard, receive: Receive) -> None:
        self._guard = guard
        self._receive = receive
        self.size = 0

    def take(self, size: int) -> None:
        self._guard.check_size(self.size + size)
        self._guard.reserve(size)
        self.size += size

    def free(self) -> None:
        self._guard.held -= self.size
        self.size = 0

    async def receive(self) -> Message:
        message = await self._receive()
        if body := message.get("body"):
            self.take(len(body))
        return message


def _is_limited(path: str) -> bool:
    """Whether calls of this path wait for what is computed: who looks after the server is never locked out of it."""
    return path.rstrip("/") not in ADMIN_PATHS and not path.startswith(OPEN_PREFIXES)


def _declared_length(scope: Scope) -> int | None:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return None
