"""A live server with metrics, JSON logs and a request log: counters are exact, ids go through all processes."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from live_client import Api
from prometheus_client.parser import text_string_to_metric_families

from engine.bench.live_server import LiveServer, running_server


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("requests")


@pytest.fixture(scope="module")
def server(tiny_model: Path, logs: Path) -> Iterator[LiveServer]:
    with running_server(
        "--enable-metrics", "--log-format", "json", "--log-level", "debug", "--log-requests", "--log-requests-level",
        "0", "--log-requests-target", "stdout", str(logs), "--max-total-tokens", "4000", model=tiny_model,
    ) as one:  # fmt: skip
        yield one


@pytest.fixture(scope="module")
def api(server: LiveServer) -> Api:
    return Api(server.url)


def samples(api: Api) -> dict[str, float]:
    text = api.http.get("/metrics").text
    return {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}


def test_counters_are_what_was_asked(api: Api) -> None:
    before = samples(api)

    def ask(i: int) -> list[dict[str, Any]]:
        sampling = {"max_new_tokens": 5 + i % 3, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": [7 + i % 4, *range(30, 50)], "sampling_params": sampling}
        if i % 3 == 0:
            return [api.stream(**body)[-1]["meta_info"]]
        if i % 3 == 1:
            return [one["meta_info"] for one in api.generate(**{**body, "sampling_params": {**sampling, "n": 2}})]
        return [api.generate(**body)["meta_info"]]

    with ThreadPoolExecutor(8) as pool:
        metas = [meta for group in pool.map(ask, range(24)) for meta in group]
    assert api.http.get("/health").status_code == 200
    after = samples(api)
    grown = {name: after[name] - before[name] for name in after if name in before}
    assert grown["sglang:prompt_tokens_total"] == sum(meta["prompt_tokens"] for meta in metas)
    assert grown["sglang:generation_tokens_total"] == sum(meta["completion_tokens"] for meta in metas)
    assert grown["sglang:cached_tokens_total"] == sum(meta["cached_tokens"] for meta in metas) > 0
    assert grown["sglang:num_requests_total"] == len(metas)
    assert grown["sglang:num_aborted_requests_total"] == 0
    assert grown["sglang:time_to_first_token_seconds_count"] == len(metas)
    gaps = sum(meta["completion_tokens"] - 1 for meta in metas)
    assert grown["sglang:inter_token_latency_seconds_count"] == gaps
    time.sleep(1.1)  # the scheduler is asked once a second
    assert samples(api)["tokenmill:step_seconds_count"] > before["tokenmill:step_seconds_count"]
    load = api.http.get("/v1/loads").json()["loads"][0]
    assert load["max_total_num_tokens"] == 4000 and load["num_running_reqs"] == 0


def test_a_requests_id_is_in_the_lines_of_every_process(api: Api, server: LiveServer, logs: Path) -> None:
    secret = "nobody shall read this prompt"
    answer = api.generate(
        text=secret, rid="trace-me", return_timeline=True, sampling_params={"max_new_tokens": 4, "ignore_eos": True}
    )
    line = answer["meta_info"]["timeline"]
    times = [line[name] for name in ("received", "accepted", "admitted", "first_token", "finished")]
    assert times == sorted(times) and times[-1] < 60
    entries = [json.loads(text) for text in server.log().splitlines()]  # each line of each process is an object
    assert {entry["process"] for entry in entries} == {
        "launcher", "frontend", "tokenizer", "scheduler tp0", "detokenizer"
    }  # fmt: skip
    about = {entry["process"] for entry in entries if entry.get("rid") == "trace-me"}
    assert about == {"frontend", "tokenizer", "scheduler tp0", "detokenizer"}
    (file,) = logs.glob("*.log")
    assert "trace-me" in file.read_text()
    assert secret not in server.log() and secret not in file.read_text()


def test_the_log_level_reaches_every_process(api: Api, server: LiveServer) -> None:
    assert api.http.post("/configure_logging", json={"log_level": "warning", "log_requests": False}).status_code == 200
    assert api.http.get("/server_info").status_code == 200  # behind it on the ring
    before = len(server.log())
    api.generate(text="quiet", sampling_params={"max_new_tokens": 3})
    new = [json.loads(line) for line in server.log()[before:].splitlines()]
    quiet = [entry for entry in new if entry["logger"] != "uvicorn.access"]  # which has a level of its own
    assert not [entry["message"] for entry in quiet if entry["level"] in ("debug", "info")]
    assert api.http.post("/configure_logging", json={"log_level": "debug"}).status_code == 200
    assert api.http.get("/freeze_gc").text == "Garbage collection frozen.\n"
    assert api.http.get("/health").status_code == 200


def test_a_profile_of_a_live_scheduler(api: Api, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        body = {"output_dir": str(tmp_path), "num_steps": "6", "activities": ["CPU"]}
        profile = pool.submit(api.post, body, "/start_profile")
        while not profile.done():
            api.generate(text="profile this", sampling_params={"max_new_tokens": 12, "ignore_eos": True})
    assert (profile.result().status_code, profile.result().text) == (200, "Start profiling.\n")
    (file,) = tmp_path.glob("*-TP-0.trace.json.gz")
    slices = [event for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"] if event["ph"] == "X"]
    assert sum(event["name"].startswith("step") for event in slices) == 6
    kernels = {event["name"] for event in slices} - {"plan", "forward", "sample", "emit"}
    assert len(kernels) > 3  # the kinds of ops that csrc has measured
    refused = api.http.post("/stop_profile")
    wanted = "Profiling is not in progress. Call /start_profile first."
    assert (refused.status_code, refused.json()) == (400, {"error": {"message": wanted}})
    assert api.http.post("/start_profile", json={"output_dir": str(tmp_path)}).status_code == 200
    again = api.http.post("/start_profile")
    wanted = "Profiling is already in progress. Call /stop_profile first."
    assert (again.status_code, again.json()) == (400, {"error": {"message": wanted}})
    assert api.http.get("/stop_profile").text == "Stop profiling. This will take some time.\n"
