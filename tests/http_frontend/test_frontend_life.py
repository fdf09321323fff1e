"""Start, health, drain, keys and certificates of a real frontend process."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_ring import LIMITS, REPOSITORY, Live, call, events, expected, live_frontend, run_config

from engine.config import write_run_config
from engine.wire.lifecycle import Serving
from engine.wire.to_scheduler import QueryState
from engine.wire.to_tokenizer import Generate
from engine.wire.weights import UpdateWeights, WeightsUpdated
from http_frontend.pulse import FRESH


def test_health_shares_one_probe_and_any_sign_of_life_will_do(live: Live) -> None:
    client = live.client

    def probes() -> list[Generate]:
        return [message for message in live.ring.kinds(Generate) if message.rid.startswith("HEALTH_CHECK_")]

    time.sleep(2 * FRESH)
    assert client.get("/health_generate").status_code == 200
    assert (probes()[-1].input_ids, probes()[-1].sampling.max_new_tokens) == (b"\0\0\0\0", 1)
    assert client.get("/ready").status_code == client.get("/ping").status_code == 200
    count = len(probes())
    live.ring.hold.set()
    assert client.get("/health").status_code == 200
    assert len(probes()) == count, "a sign of life stands for a while"
    time.sleep(2 * FRESH)
    try:
        with ThreadPoolExecutor(6) as pool:
            checks = [pool.submit(client.get, "/health") for _ in range(6)]
            live.ring.wait_for(lambda: len(probes()) == count + 1)
            assert client.get("/server_info").status_code == 200
            assert [check.result().status_code for check in checks] == [200] * 6
            time.sleep(2 * FRESH)
            assert client.get("/health").status_code == 200
            assert len(probes()) == count + 1
            assert client.get("/flush_cache?timeout=0").text != ""
    finally:
        live.ring.hold.clear()


def test_health_while_the_scheduler_says_nothing_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a long prefill no token comes in time, but the scheduler answers a question, of which there is one."""
    monkeypatch.setenv("SGLANG_HEALTH_CHECK_TIMEOUT", "3")
    with live_frontend() as live, ThreadPoolExecutor(5) as pool:
        live.ring.hold.set()
        time.sleep(2 * FRESH)
        checks = [pool.submit(live.client.get, "/health") for _ in range(5)]
        assert [check.result().status_code for check in checks] == [200] * 5
        assert len(live.ring.kinds(QueryState)) == 1
        time.sleep(2 * FRESH)
        assert live.client.get("/health_generate").status_code == 200
        assert len(live.ring.kinds(QueryState)) == 2
        assert len([one for one in live.ring.kinds(Generate) if one.rid.startswith("HEALTH_CHECK_")]) == 1


def test_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The port answers, `/health` does not; what comes early waits for the model instead of failing."""
    monkeypatch.setenv("SGLANG_HEALTH_CHECK_TIMEOUT", "0.2")
    with live_frontend(warm=False, log_level_http="info", uvicorn_access_log_exclude_prefixes=["/v1"]) as live:
        assert live.client.get("/v1/models").status_code == 200
        assert [live.client.get(path).status_code for path in ("/health", "/health_generate", "/ready")] == [503] * 3
        with ThreadPoolExecutor(1) as pool:
            info = pool.submit(live.client.get, "/server_info")
            live.serve()
            assert info.result().json()["max_req_input_len"] == 4000
        (warm_up,) = [message for message in live.ring.kinds(Generate) if message.rid.startswith("WARM_UP")]
        assert (warm_up.sampling.max_new_tokens, warm_up.sampling.temperature) == (8, 0.0)
        assert live.client.get("/health").status_code == 200
        live.ring.silent.set()
        time.sleep(2 * FRESH)
        assert live.client.get("/health").status_code == 503
        live.ring.silent.clear()
        live.drain(0)
        assert live.process.wait(20) == 0
        assert live.process.stderr is not None
        logged = live.process.stderr.read().decode()
        assert "GET /health" in logged
        assert "GET /v1/models" not in logged


def test_drain_refuses_new_work_and_lets_the_old_finish() -> None:
    with live_frontend() as live, ThreadPoolExecutor(2) as pool:
        live.ring.hold.set()
        running = pool.submit(live.client.post, "/generate", json=call("abc", 20))
        streamed = pool.submit(live.client.post, "/generate", json=call("abc", 20, stream=True))
        live.ring.wait_for(lambda: len(live.ring.running) == 2)
        live.drain(30)
        while live.client.get("/health").status_code == 200:
            pass
        refused = live.client.post("/generate", json=call("new"))
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert (refused.json()["object"], "shutting down" in refused.json()["message"]) == ("error", True)
        live.ring.hold.clear()
        assert running.result().json()["text"] == expected("abc", 20)[0]
        assert events(streamed.result())[-1]["text"] == expected("abc", 20)[0]
        assert live.process.wait(20) == 0


def test_drain_aborts_what_does_not_finish_in_time() -> None:
    with live_frontend(log_level="warning") as live, ThreadPoolExecutor(2) as pool:
        running = pool.submit(live.client.post, "/generate", json=call("abc", 10**9))
        live.ring.wait_for(lambda: any(one.made for one in live.ring.running.values()))
        live.drain(0.2)
        answer = running.result()
        assert (answer.status_code, answer.json()["meta_info"]["finish_reason"]["type"]) == (200, "abort")
        assert answer.json()["output_ids"]
        assert live.process.wait(20) == 0


def test_drain_answers_even_when_the_scheduler_is_silent() -> None:
    with live_frontend() as live, ThreadPoolExecutor(1) as pool:
        live.ring.silent.set()
        running = pool.submit(live.client.post, "/generate", json=call("abc"))
        live.ring.wait_for(lambda: len(live.ring.kinds(Generate)) == 2)
        live.drain(0.1)
        assert running.result().json()["meta_info"]["finish_reason"]["type"] == "abort"
        assert live.process.wait(20) == 0


def test_drain_lets_questions_have_their_answers() -> None:
    """A weight update is waited for, and so is its caller told; what is not answered in time is a 503."""
    for seconds, answered in ((30, True), (0.2, False)):
        with live_frontend(log_level="warning") as live, ThreadPoolExecutor(2) as pool:
            live.ring.silent.set()
            update = pool.submit(live.client.post, "/update_weights", json={"model_path": "org/new"})
            live.ring.wait_for(lambda live=live: bool(live.ring.kinds(UpdateWeights)))
            live.drain(seconds)
            while live.client.get("/health").status_code == 200:
                pass
            if answered:
                (asked,) = live.ring.kinds(UpdateWeights)
                live.ring.send(
                    WeightsUpdated(
                        key=asked.key, success=True, message="done", weight_version="2", model_path=None, paused=False
                    )
                )
            told = update.result()
            assert (told.status_code, told.json()["success"]) == ((200, True) if answered else (503, False))
            assert answered or "shutting down" in told.json()["message"]
            assert live.process.wait(20) == 0


def test_a_failed_warm_up_ends_the_process_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_WARMUP_TIMEOUT", "0.3")
    with live_frontend(warm=False) as live:
        live.ring.silent.set()
        live.ring.send(Serving(0, LIMITS))
        assert live.process.wait(20) == 1
        assert live.process.stderr is not None
        assert "the warm-up request has not ended within 0.3 s" in live.process.stderr.read().decode()


def test_keys_root_path_and_no_tokenizer() -> None:
    server = {"api_key": "user", "admin_api_key": "boss", "fastapi_root_path": "/api", "skip_tokenizer_init": True}
    with live_frontend(**server) as live:

        def status(method: str, path: str, key: str | None) -> int:
            headers = {} if key is None else {"Authorization": f"bearer {key}"}
            return live.client.request(method, path, headers=headers).status_code

        assert [status("GET", "/v1/models", key) for key in (None, "user", "boss")] == [401, 200, 401]
        assert [status("GET", "/flush_cache", key) for key in (None, "user", "boss")] == [401, 401, 200]
        for action in ("start", "stop", "dump"):
            path = f"/{action}_expert_distribution_record"
            assert [status("POST", path, key) for key in (None, "user", "boss")] == [401, 401, 400]
        assert [status("GET", "/api/flush_cache", key) for key in (None, "user", "boss")] == [401, 401, 200]
        assert [status("GET", path, None) for path in ("/health", "/ready", "/api/health", "/ping")] == [200] * 3 + [
            401
        ]
        assert status("OPTIONS", "/generate", None) != 401
        assert live.client.get("/v1/models").json() == {"error": "Unauthorized"}
        info = live.client.get("/server_info", headers={"Authorization": "Bearer user"}).json()
        assert (info["api_key"], info["admin_api_key"]) == (None, None)
        answer = live.client.post("/api/generate", json=call("ab", 2), headers={"Authorization": "Bearer user"}).json()
        assert answer["output_ids"] == [2, 3]
        assert "text" not in answer


def test_tls(tmp_path: Path) -> None:
    """The certificate flags reach the server: a client that trusts the authority gets its answer."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = subprocess.run(
        [
            *[
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=localhost",
                "-addext",
            ],
            *("subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)),
        ],
        capture_output=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    with live_frontend(ssl_keyfile=str(key), ssl_certfile=str(certificate)) as live:
        trust = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(base_url=f"https://127.0.0.1:{live.port}", verify=trust) as client:
            assert client.post("/generate", json=call("ab", 3)).json()["text"] == expected("ab", 3)[0]


@pytest.mark.parametrize(
    ("server", "part"),
    [
        ({"preferred_sampling_params": {"top": 1}}, "--preferred-sampling-params"),
        ({"ssl_keyfile": __file__, "ssl_certfile": __file__}, f"the --ssl-... files {__file__}, {__file__} cannot"),
    ],
)
def test_settings_that_cannot_be_used_end_the_process_with_the_flags_name(
    tmp_path: Path, server: dict[str, Any], part: str
) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    write_run_config(run_config(str(tmp_path), os.getpid(), **server), tmp_path / "c")
    command = [sys.executable, "-m", "http_frontend", "--config", str(tmp_path / "c"), "--fd", str(listener.fileno())]
    with listener:
        ended = subprocess.run(
            command, cwd=REPOSITORY, pass_fds=(listener.fileno(),), capture_output=True, timeout=20, check=False
        )
    assert ended.returncode == 1
    assert part.encode() in ended.stderr
    assert b"Traceback" not in ended.stderr
