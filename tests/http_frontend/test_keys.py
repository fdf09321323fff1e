"""Which key opens which route: every route of the application stands in one of the tables here."""

from __future__ import annotations

import asyncio
import hmac
import os
import tempfile
from typing import Any

import pytest
import zmq
from fake_ring import run_config

from http_frontend.app import _routes
from http_frontend.auth import ApiKeys
from http_frontend.frontend import Frontend

OPEN = {"/health", "/health_generate", "/ready", "/metrics"}
ADMIN = {
    "/abort_request", "/configure_logging", "/continue_generation", "/dump_expert_distribution_record", "/flush_cache",
    "/freeze_gc", "/get_weights_by_name", "/load_lora_adapter", "/pause_generation", "/release_memory_occupation",
    "/resume_memory_occupation", "/set_internal_state", "/set_trace_level", "/slow_down",
    "/start_expert_distribution_record", "/start_profile", "/stop_expert_distribution_record", "/stop_profile",
    "/unload_lora_adapter", "/update_weight_version", "/update_weights", "/update_weights_from_disk",
}  # fmt: skip
ORDINARY = {
    "/", "/classify", "/detokenize", "/encode", "/generate", "/get_load", "/get_model_info", "/get_server_info",
    "/model_info", "/openapi.json", "/ping", "/server_info", "/tokenize", "/v1/detokenize", "/v1/embeddings",
    "/v1/loads", "/v1/models", "/v1/models/{id:path}", "/v1/rerank", "/v1/score", "/v1/tokenize",
}  # fmt: skip
"""Some are of the contract and still to come."""

# Configured keys (ordinary, admin) → statuses with no key, the ordinary one, the admin one: contract §2.5.
RULES: list[tuple[str | None, str | None, tuple[int, int, int], tuple[int, int, int]]] = [
    (None, None, (200, 200, 200), (200, 200, 200)),
    ("user", None, (401, 200, 401), (401, 200, 401)),
    (None, "boss", (200, 200, 200), (401, 401, 200)),
    ("user", "boss", (401, 200, 401), (401, 401, 200)),
]


def routes() -> set[str]:
    with tempfile.TemporaryDirectory(prefix="tm") as folder, zmq.Context() as context:
        frontend = Frontend(run_config(folder, os.getpid()), context)
        paths = {route.path for route in _routes(frontend)}
        frontend.ring._inbox.close()
        for outbox in (frontend.ring._tokenizer, frontend.ring._detokenizer, frontend.ring._launcher):
            outbox.close(0)
        return paths


def status(keys: tuple[str | None, str | None], path: str, *headers: tuple[bytes, bytes], method: str = "GET") -> int:
    """What the key layer answers; 200 when it lets the request through."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    started: list[int] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            started.append(message["status"])

    layer = ApiKeys(app, api_key=keys[0], admin_key=keys[1], path_of=lambda scope: scope["path"])

    async def ask() -> None:
        await layer({"type": "http", "method": method, "path": path, "headers": list(headers)}, receive, send)

    asyncio.run(ask())
    return started[0]


def bearer(key: str | None) -> list[tuple[bytes, bytes]]:
    return [] if key is None else [(b"authorization", b"Bearer " + key.encode())]


def test_every_route_is_in_one_table() -> None:
    found = routes()
    assert len(found) > 20
    assert found <= OPEN | ADMIN | ORDINARY
    assert not OPEN & ADMIN and not ADMIN & ORDINARY and not OPEN & ORDINARY


@pytest.mark.parametrize(("user", "boss", "ordinary", "admin"), RULES)
def test_the_rules_of_keys(
    user: str | None, boss: str | None, ordinary: tuple[int, ...], admin: tuple[int, ...]
) -> None:
    for path in sorted(routes() | OPEN):
        wanted = (200, 200, 200) if path in OPEN else admin if path in ADMIN else ordinary
        got = tuple(status((user, boss), path, *bearer(key)) for key in (None, "user", "boss"))
        assert got == wanted, path
        assert status((user, boss), path, method="OPTIONS") == 200


def test_how_a_key_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ("kéy", None)
    given = {
        b"Bearer " + "kéy".encode(): 200,
        b"bearer  " + "kéy".encode() + b" ": 200,
        b"Basic " + "kéy".encode(): 401,
        "kéy".encode(): 401,
        b"Bearer": 401,
        b"Bearer \xff": 401,
        b"Bearer " + "kéyy".encode(): 401,
    }
    for value, wanted in given.items():
        assert status(keys, "/generate", (b"authorization", value)) == wanted, value
    # Compared as a whole, in a time that does not tell how much of it is right.
    compared: list[tuple[bytes, bytes]] = []

    def spy(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", spy)
    assert status(("secret", None), "/generate", *bearer("secreT")) == 401
    assert compared == [(b"secreT", b"secret")]
