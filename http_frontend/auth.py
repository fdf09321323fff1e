"""API keys (contract §2.5), as plain ASGI: nothing is wrapped around the answer of a request that passes."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from http_frontend.errors import json_response

ADMIN_PATHS = frozenset(
    {
        "/flush_cache",
        "/abort_request",
        "/update_weights_from_disk",
        "/update_weights",
        "/update_weight_version",
        "/get_weights_by_name",
        "/pause_generation",
        "/continue_generation",
        "/start_expert_distribution_record",
        "/stop_expert_distribution_record",
        "/dump_expert_distribution_record",
        "/configure_logging",
        "/start_profile",
        "/stop_profile",
        "/freeze_gc",
        "/slow_down",
        "/set_internal_state",
        "/set_trace_level",
    }
)
"""Routes that the admin key guards."""

OPEN_PREFIXES = ("/health", "/ready", "/metrics")
"""Beginnings of paths that need no key, and are answered at any load."""


class ApiKeys:
    """Lets a request through to `app` when it carries the key that its route needs.

    `path_of` gives a request's path without the root path.
    """

    def __init__(
        self, app: ASGIApp, *, api_key: str | None, admin_key: str | None, path_of: Callable[[Any], str]
    ) -> None:
        self._app = app
        self._api_key = api_key
        self._admin_key = admin_key
        self._path_of = path_of

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] != "http" or scope["method"] == "OPTIONS":
            return self._app(scope, receive, send)
        needed = key_of(self._path_of(scope), self._api_key, self._admin_key)
        if needed is None or _carries(scope, needed):
            return self._app(scope, receive, send)
        return json_response({"error": "Unauthorized"}, 401)(scope, receive, send)


def key_of(path: str, api_key: str | None, admin_key: str | None) -> str | None:
    """The one of the configured keys that a request for `path` must carry; None when it is open."""
    if path.startswith(OPEN_PREFIXES):
        return None
    if path.rstrip("/") in ADMIN_PATHS and admin_key is not None:
        return admin_key
    return api_key


def _carries(scope: Scope, key: str) -> bool:
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, token = value.partition(b" ")
            return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), key.encode())
    return False
