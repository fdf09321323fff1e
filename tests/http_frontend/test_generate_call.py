"""A call that breaks while it is being started is answered, and leaves nothing in the journal: a drain would wait for
it."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fake_ring import run_config

from engine.wire.to_scheduler import Abort
from engine.wire.to_tokenizer import Generate
from http_frontend.frontend import Frontend
from http_frontend.generate import GenerateEndpoint
from http_frontend.items import Desk
from http_frontend.journal import Journal
from http_frontend.metrics import Metrics
from http_frontend.turnstile import Turnstile


@pytest.mark.parametrize("samples", [1, 2])
def test_a_call_that_cannot_be_sent_leaves_no_entry(samples: int, caplog: pytest.LogCaptureFixture) -> None:
    sent: list[Any] = []
    answered: list[Any] = []

    def send(message: Any) -> None:
        if isinstance(message, Generate) and message.text == "second":
            raise OSError("no message can be sent")
        sent.append(message)

    journal = Journal(send)

    async def receive() -> dict[str, Any]:
        if received:
            await asyncio.Event().wait()
        received.append(True)
        body = {"text": ["first", "second", "third"], "sampling_params": {"n": samples}}
        return {"type": "http.request", "body": json.dumps(body).encode()}

    async def answer(message: Any) -> None:
        answered.append(message)

    async def call() -> None:
        run = run_config("/nowhere", 1)
        frontend = SimpleNamespace(
            run=run, journal=journal, loop=asyncio.get_running_loop(), weight_version="w", check_open=lambda: None,
            check_any_room=lambda: None, check_room=lambda _messages: None, turnstile=Turnstile(),
            desk=Desk(run, None, itertools.count(1).__next__, random.Random(0), journal.is_running), metrics=Metrics(),
        )  # fmt: skip
        scope = {"type": "http", "headers": [(b"content-type", b"application/json")]}
        await GenerateEndpoint(cast(Frontend, frontend))(scope, receive, answer)

    received: list[bool] = []
    asyncio.run(call())
    assert answered[0]["status"] == 500 and answered[1]["body"] == b"Internal Server Error"
    assert "OSError: no message can be sent" in caplog.text
    assert len(journal) == 0
    first = next(message.key for message in sent if isinstance(message, Generate))
    assert first in next(message.keys for message in sent if isinstance(message, Abort))
