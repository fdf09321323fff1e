"""Administrative routes for operators, and the request log, of a real frontend process."""

from __future__ import annotations

import json
import logging
import time
from array import array
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_ring import Live, call, live_frontend

from engine.wire.operation import Profile, SlowDown, Tune
from engine.wire.results import Finish
from engine.wire.to_tokenizer import Embed
from http_frontend.journal import Entry, nothing_to_do
from http_frontend.request_log import RequestLog

SECRET = "a prompt that nobody else is to read"


def test_small_switches(live: Live) -> None:
    client = live.client
    for method in ("GET", "POST"):
        frozen = client.request(method, "/freeze_gc")
        assert (frozen.status_code, frozen.text) == (200, "Garbage collection frozen.\n")
        slowed = client.request(method, "/slow_down", json={"forward_sleep_time": "0.25"})
        assert (slowed.status_code, slowed.json()) == (200, None)
    assert client.post("/slow_down", json={"forward_sleep_time": None}).status_code == 200
    live.ring.wait_for(lambda: len(live.ring.kinds(SlowDown)) >= 3)
    assert [message.seconds for message in live.ring.kinds(SlowDown)][-3:] == [0.25, 0.25, 0.0]
    assert any(message.freeze_gc for message in live.ring.kinds(Tune))
    assert "[0, 60]" in client.post("/slow_down", json={"forward_sleep_time": -1}).json()["error"]["message"]
    assert "Field required" in client.post("/slow_down").json()["message"]
    for given, good in (
        ({"pp_max_micro_batch_size": 8}, True), ({"pp_max_micro_batch_size": 65}, False),
        ({"speculative_accept_threshold_single": 0.5}, True), ({"max_running_requests": 1}, False),
    ):  # fmt: skip
        answer = client.post("/set_internal_state", json={"server_args": given})
        assert (answer.status_code, answer.json()) == (200, [good])
    assert client.get("/set_internal_state").status_code == 405
    assert client.get("/set_trace_level?level=2").text == "success"
    assert client.get("/set_trace_level?level=x").json()["type"] == "Bad Request"


def test_the_environment_says_where_profiles_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SGLANG_TORCH_PROFILER_DIR", str(tmp_path))
    with live_frontend() as live:
        assert live.client.get("/start_profile").status_code == 200
        assert live.ring.kinds(Profile)[-1].folder == str(tmp_path)


def test_profiles_go_to_the_scheduler(live: Live, tmp_path: Path) -> None:
    client = live.client
    body = {"output_dir": str(tmp_path), "num_steps": "5", "profile_prefix": "a", "profile_id": "b", "activities": None}
    started = client.post("/start_profile", json=body)
    assert (started.status_code, started.text) == (200, "Start profiling.\n")
    asked = live.ring.kinds(Profile)[-1]
    assert (asked.folder, asked.name, asked.num_steps, asked.start_step) == (str(tmp_path), "a-b", 5, None)
    again = client.get("/start_profile")
    assert (again.status_code, again.json()) == (400, {"error": {"message": "cannot"}})
    stopped = client.get("/stop_profile")
    assert (stopped.status_code, stopped.text) == (200, "Stop profiling. This will take some time.\n")
    assert live.ring.kinds(Profile)[-2].folder == "/tmp"
    for wrong in ({"num_steps": 0}, {"profile_id": "../x"}, {"activities": ["TPU"]}):
        assert client.post("/start_profile", json=wrong).status_code == 400
    assert client.post("/start_profile", content=b"[", headers={"content-type": "application/json"}).status_code == 400


def test_admin_routes_want_the_admin_key() -> None:
    paths = ("configure_logging", "start_profile", "stop_profile", "freeze_gc", "slow_down", "set_trace_level?level=1")
    with live_frontend(admin_api_key="a") as live:
        for path in paths:
            assert live.client.get(f"/{path}").status_code == 401
        assert live.client.post("/set_internal_state", json={}).status_code == 401
        assert live.client.get("/v1/loads").status_code == 200


def lines(folder: Path) -> list[dict[str, Any]]:
    (file,) = folder.glob("requests-*.log")
    assert file.stat().st_mode & 0o777 == 0o600
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_request_log_shows_what_its_level_allows(tmp_path: Path) -> None:
    with live_frontend(
        log_requests=True, log_requests_level=0, log_requests_format="json", log_requests_target=[str(tmp_path)]
    ) as live:
        client = live.client

        def logged(**fields: Any) -> list[dict[str, Any]]:
            before = len(lines(tmp_path))
            assert client.post("/generate", json=call(SECRET, 3, rid="r1", **fields)).status_code == 200
            return lines(tmp_path)[before:]

        def configure(**fields: Any) -> None:
            answer = client.post("/configure_logging", json=fields)
            assert (answer.status_code, answer.content) == (200, b"")

        assert client.get("/health").status_code == 200
        received, finished = logged()
        assert (received["event"], finished["event"]) == ("request.received", "request.finished")
        assert received["rid"] == finished["rid"] == "r1"
        assert finished["out"]["completion_tokens"] == 3 and finished["out"]["finish_reason"]["kind"] == "length"
        assert SECRET not in json.dumps([received, finished]) and "sampling_params" not in received["obj"]
        configure(log_requests_level=1)
        received, finished = logged()
        assert received["obj"]["sampling_params"]["max_new_tokens"] == 3
        assert SECRET not in json.dumps([received, finished]) and "text" not in finished["out"]
        configure(log_requests_level="2")
        received, finished = logged()
        assert received["obj"]["text"] == SECRET and finished["out"]["output_ids"]
        long = SECRET * 100
        assert client.post("/generate", json=call(long, 2)).status_code == 200
        assert lines(tmp_path)[-2]["obj"]["text"].endswith(f"... ({len(long)} characters)")
        configure(log_requests_level=3)
        assert client.post("/generate", json=call(long, 2)).status_code == 200
        assert lines(tmp_path)[-2]["obj"]["text"] == long
        assert logged(no_logs=True) == []
        configure(log_requests=False, log_level="debug")
        assert logged() == []
        live.ring.wait_for(lambda: any(message.log_level == "debug" for message in live.ring.kinds(Tune)))
        for wrong in ({"log_requests_level": 4}, {"log_level": "loud"}, {"log_requests_format": "xml"}):
            assert client.post("/configure_logging", json=wrong).status_code == 400
        assert "Field required" in client.post("/configure_logging").json()["message"]


def test_only_slow_requests_are_logged_where_that_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_LOG_REQUEST_EXCEEDED_MS", "300")
    with live_frontend(log_requests=True, log_requests_format="json", log_requests_target=[str(tmp_path)]) as live:
        assert live.client.post("/generate", json=call("quick", 1, rid="quick")).status_code == 200
        live.ring.hold.set()
        with pytest.raises(httpx.ReadTimeout):
            live.client.post("/generate", json=call("slow", 1, rid="slow"), timeout=0.6)
        live.ring.hold.clear()
        deadline = time.monotonic() + 10
        while not lines(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.02)
        (line,) = lines(tmp_path)
        assert (line["event"], line["rid"], line["out"]["finish_reason"]) == ("request.finished", "slow", "disconnect")


def test_lines_of_text_and_of_entries_that_are_nobodys(caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog(on=True, level=2, form="text", slower_than=0.0, logger=logging.getLogger("of.a.test"))
    embed = Embed(key=1, attempt=0, rid="e", text=None, pair=None, input_ids=array("i", [7, 8]).tobytes())
    entry = Entry(embed, nothing_to_do)
    with caplog.at_level(logging.INFO, "of.a.test"):
        log.received(entry)
        entry.finish, entry.prompt_tokens, entry.finished = Finish("length", length=0), 2, entry.arrived + 0.5
        log.ended(entry)
        log.received(Entry(embed, nothing_to_do, probe=True))
    received, finished = caplog.records
    assert received.getMessage() == "Receive: rid=e, obj=(kind='embed', text=None, input_ids=[7, 8])"
    assert finished.getMessage().startswith("Finish: rid=e, obj=(") and "prompt_tokens=2" in finished.getMessage()
    assert received.rid == "e"  # type: ignore[attr-defined]
