"""The real tree: what a signal does to it, to a request in flight and to one that comes later."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import httpx

from engine.bench.live_server import END_TIMEOUT, PROCESSES, running_server

LONG = {"text": "Once upon a time", "stream": True, "sampling_params": {"max_new_tokens": 150, "ignore_eos": True}}


def chunks(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def test_a_signal_lets_running_requests_finish_and_refuses_new_ones() -> None:
    with running_server() as server:
        assert server.pids.keys() == PROCESSES
        assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200
        assert httpx.get(f"{server.url}/v1/models", timeout=30).json()["data"][0]["id"] == "SmolLM2-135M-Instruct"
        with httpx.stream("POST", f"{server.url}/generate", json=LONG, timeout=120) as answer:
            stream = chunks(answer)
            last = next(stream)
            server.launcher.send_signal(signal.SIGTERM)
            refused = httpx.post(f"{server.url}/generate", json={"text": "a"}, timeout=60)
            while refused.status_code == 200:  # it came before the signal had reached the frontend
                refused = httpx.post(f"{server.url}/generate", json={"text": "a"}, timeout=60)
            assert refused.status_code == 503
            assert httpx.get(f"{server.url}/health", timeout=30).status_code == 503
            for last in stream:  # noqa: B007
                pass
        assert last["meta_info"]["completion_tokens"] == 150
        assert last["meta_info"]["finish_reason"]["type"] == "length"
        assert server.launcher.wait(END_TIMEOUT) == 0
