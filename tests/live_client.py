"""What the end-to-end tests send to a live server, and how they read what comes back."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

Json = dict[str, Any]

IDLE_TIMEOUT = 20.0
"""Seconds in which a server must have got rid of everything that was asked of it."""


class Api:
    """One server's client."""

    def __init__(self, url: str, **headers: str) -> None:
        self.url = url
        self.http = httpx.Client(
            base_url=url, headers=headers, timeout=120, limits=httpx.Limits(max_connections=128), trust_env=False
        )

    def post(self, body: Any, path: str = "/generate") -> httpx.Response:
        return self.http.post(path, json=body)

    def generate(self, **body: Any) -> Any:
        """The JSON of a call that must be answered with 200."""
        answer = self.post(body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stream(self, **body: Any) -> list[Json]:
        """The chunks of a whole stream."""
        answer = self.post({**body, "stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        return parse_events(answer.text)

    @contextmanager
    def open_stream(self, **body: Any) -> Iterator[Iterator[Json]]:
        """The chunks of a stream as they come; leaving the block hangs up."""
        with self.http.stream("POST", "/generate", json={**body, "stream": True}) as answer:
            assert answer.status_code == 200
            yield _chunks(answer.iter_lines())

    def state(self) -> Json:
        """`internal_states[0]` of /server_info."""
        state: Json = self.http.get("/server_info").raise_for_status().json()["internal_states"][0]
        return state

    def wait_until(self, **wanted: int) -> Json:
        """Ask for the state until it has the `wanted` values; each question waits for the scheduler's answer."""
        deadline = time.monotonic() + IDLE_TIMEOUT
        while True:
            state = self.state()
            if all(state[name] == value for name, value in wanted.items()):
                return state
            assert time.monotonic() < deadline, f"not {wanted} within {IDLE_TIMEOUT} s: {state}"

    def wait_idle(self) -> Json:
        """Until nothing runs, waits or holds slots."""
        return self.wait_until(num_running_reqs=0, num_waiting_reqs=0, num_used_tokens=0)

    def flush(self) -> None:
        self.http.post("/flush_cache?timeout=20").raise_for_status()


def parse_events(text: str) -> list[Json]:
    """The chunks of an event stream: `data: ` lines with blank lines between, and one [DONE] at the very end."""
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""], text[-200:]
    assert all(event.startswith("data: {") and "\n" not in event for event in events[:-2])
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def _chunks(lines: Iterable[str]) -> Iterator[Json]:
    for line in lines:
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def check_growth(chunks: list[Json]) -> Json:
    """Assert that cumulative chunks of one request only ever grow and that only the last is final. Returns that."""
    for before, after in itertools.pairwise(chunks):
        assert after["text"].startswith(before["text"])
        assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
        assert before["meta_info"]["finish_reason"] is None
    for chunk in chunks:
        assert chunk["meta_info"]["completion_tokens"] == len(chunk["output_ids"])
    assert chunks[-1]["meta_info"]["finish_reason"] is not None
    return chunks[-1]


def greedy(tokens: int, **more: Any) -> Json:
    """`sampling_params` for exactly `tokens` greedy tokens, unless `more` stops them."""
    return {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, **more}
