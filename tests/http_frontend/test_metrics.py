"""/metrics and /v1/loads of a real frontend process, and what is counted when."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_ring import Live, call, events, live_frontend
from prometheus_client.parser import text_string_to_metric_families

from engine.wire.to_scheduler import QueryState
from http_frontend.histogram import Histogram
from http_frontend.metrics import Metrics, count_refused, count_replays, count_restart

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def counted() -> Iterator[Live]:
    with live_frontend(enable_metrics=True, api_key="k", served_model_name="the-model") as live:
        live.client.headers["Authorization"] = "Bearer k"
        yield live


def samples(live: Live) -> dict[str, float]:
    """Every sample by its name and the labels beside the model's."""
    answer = live.client.get("/metrics", headers={"Authorization": ""})  # open, whatever the keys
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "the-model"
            found["/".join([sample.name, *labels.values()])] = sample.value
    return found


def grown(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0.0) for name, value in after.items() if value != before.get(name, 0.0)}


def test_tokens_and_requests_are_counted_exactly(counted: Live) -> None:
    before = samples(counted)
    client = counted.client
    answers: list[Any] = [client.post("/generate", json=call(text, tokens)).json() for text, tokens in (("ab", 3),)]
    answers += client.post("/generate", json=call(["x", "yyy"], 5)).json()
    answers += client.post("/generate", json={**call("n", 2), "sampling_params": {"n": 3, "max_new_tokens": 2}}).json()
    answers.append(events(client.post("/generate", json=call("stream", 7, stream=True)))[-1])
    assert client.post("/generate", json=call("REFUSE no")).status_code == 400
    assert client.post("/generate", json=call(5)).status_code == 400
    assert client.post("/generate", json=call("QUEUE full")).status_code == 503
    assert client.post("/generate", json=call("BREAK it", 9)).status_code == 500
    for _ in range(3):
        assert client.get("/health").status_code == 200
    new = grown(before, samples(counted))
    metas = [answer["meta_info"] for answer in answers]
    broken = {"prompt": len("BREAK it"), "completion": 3, "cached": 2}  # tokens before it broke
    assert new["sglang:prompt_tokens_total"] == sum(m["prompt_tokens"] for m in metas) + broken["prompt"]
    assert new["sglang:generation_tokens_total"] == sum(m["completion_tokens"] for m in metas) + broken["completion"]
    assert new["sglang:cached_tokens_total"] == sum(m["cached_tokens"] for m in metas) + broken["cached"]
    assert new["sglang:num_requests_total"] == len(metas) + 2
    assert new["sglang:num_aborted_requests_total"] == 2
    assert new["tokenmill:failed_requests_total"] == 1
    assert new["tokenmill:refused_total/invalid"] == 2
    assert new["tokenmill:refused_total/overloaded"] == 1
    assert new["sglang:e2e_request_latency_seconds_count"] == len(metas)
    assert new["sglang:time_to_first_token_seconds_count"] == len(metas) + 1
    gaps = sum(m["completion_tokens"] - 1 for m in metas) + 2
    assert new["sglang:inter_token_latency_seconds_count"] == gaps
    assert new["tokenmill:request_body_bytes_count"] == 8
    assert 0 < new["sglang:inter_token_latency_seconds_sum"] < new["sglang:e2e_request_latency_seconds_sum"]


def test_a_client_that_leaves_is_counted_as_aborted(counted: Live) -> None:
    before = samples(counted)
    counted.ring.hold.set()
    try:
        with pytest.raises(httpx.ReadTimeout):
            counted.client.post("/generate", json=call("gone"), timeout=0.3)
        counted.ring.wait_for(lambda: not counted.ring.running)
    finally:
        counted.ring.hold.clear()
    new = grown(before, samples(counted))
    assert (new["sglang:num_requests_total"], new["sglang:num_aborted_requests_total"]) == (1, 1)
    assert "sglang:prompt_tokens_total" not in new


def test_gauges_are_of_the_scheduler_and_it_is_asked_once_a_second(counted: Live) -> None:
    time.sleep(1.05)
    counted.ring.state = {
        "last_gen_throughput": 88.5, "num_running_reqs": 2, "num_waiting_reqs": 3, "num_used_tokens": 1024,
        "num_cached_tokens": 512, "num_free_tokens": 2560, "num_waiting_uncached_tokens": 40, "cache_hit_rate": 0.5,
        "step_bounds": [0.1, 1.0], "step_buckets": [5, 1, 0], "step_seconds": 0.9, "num_retracted_reqs": 1,
    }  # fmt: skip
    asked, began = len(counted.ring.kinds(QueryState)), time.monotonic()
    for _ in range(20):
        found = samples(counted)
    assert 1 <= len(counted.ring.kinds(QueryState)) - asked <= 2 + time.monotonic() - began
    assert found["sglang:num_running_reqs"] == 2
    assert found["sglang:num_queue_reqs"] == 3
    assert found["sglang:num_used_tokens"] == 1024
    assert found["sglang:token_usage"] == 0.25
    assert found["sglang:cache_hit_rate"] == 0.5
    assert found["sglang:gen_throughput"] == 88.5
    assert found["tokenmill:kv_pool_tokens/cached"] == 512
    assert (found["tokenmill:step_seconds_count"], found["tokenmill:step_seconds_bucket/0.1"]) == (6, 5)
    loads = counted.client.get("/v1/loads").json()
    assert loads["num_accelerators"] == 1 and isinstance(loads["version"], str) and "T" in loads["timestamp"]
    (load,) = loads["loads"]
    assert load.pop("timestamp") > 1e9
    memory, queues = load.pop("memory"), load.pop("queues")
    assert load == {
        "dp_rank": 0, "num_running_reqs": 2, "num_waiting_reqs": 3, "num_waiting_uncached_tokens": 40,
        "num_used_tokens": 1024, "num_total_tokens": 1064, "max_total_num_tokens": 4096, "max_running_requests": 64,
        "token_usage": 0.25, "gen_throughput": 88.5, "cache_hit_rate": 0.5, "utilization": 0.25,
    }  # fmt: skip
    assert memory == {"weight_gb": 0.1, "kv_cache_gb": 0.2, "graph_gb": 0.0, "token_capacity": 4096}
    assert queues == {"waiting": 3, "grammar": 0, "paused": 0, "retracted": 1}
    old = counted.client.get("/get_load").json()
    assert old == [{"dp_rank": 0, "num_reqs": 5, "num_waiting_reqs": 3, "num_tokens": 1064}]


def test_loads_takes_what_is_wanted_of_it(counted: Live) -> None:
    client = counted.client
    core = client.get("/v1/loads?include=core").json()["loads"][0]
    assert "memory" not in core and "queues" not in core and core["max_running_requests"] == 64
    assert "queues" in client.get("/v1/loads?include=core,queues&dp_rank=0").json()["loads"][0]
    text = client.get("/v1/loads?format=prometheus").text
    families = {family.name: family.samples[0] for family in text_string_to_metric_families(text)}
    assert families["sglang:max_total_num_tokens"].value == 4096
    assert families["sglang:memory_token_capacity"].labels == {"dp_rank": "0"}
    for wrong in ("include=core,nothing", "format=xml", "dp_rank=x"):
        refused = client.get(f"/v1/loads?{wrong}")
        assert (refused.status_code, refused.json()["type"]) == (400, "Bad Request")
    assert "[0, 1)" in client.get("/v1/loads?dp_rank=1").json()["error"]["message"]
    assert httpx.get(f"http://127.0.0.1:{counted.port}/v1/loads").status_code == 401


def test_metrics_answer_while_the_scheduler_does_not(counted: Live) -> None:
    time.sleep(1.05)
    counted.ring.silent.set()
    try:
        started = time.monotonic()
        found = samples(counted)
        assert time.monotonic() - started < 1.0
        assert counted.client.get("/v1/loads").status_code == 200
    finally:
        counted.ring.silent.clear()
    assert found["tokenmill:scheduler_state_age_seconds"] > 1.0


def test_the_dashboard_asks_for_nothing_that_is_not_there(counted: Live) -> None:
    text = httpx.get(f"http://127.0.0.1:{counted.port}/metrics").text
    there = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE):
        there |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"} if kind == "histogram" else {name}
    dashboard = json.loads((REPOSITORY / "scripts/grafana/tokenmill.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    queries += [variable["query"]["query"] for variable in dashboard["templating"]["list"] if "datasource" in variable]
    asked = {name for query in queries for name in re.findall(r"\b(?:sglang|tokenmill):\w+", query)}
    assert len(queries) > 30 and asked <= there, asked - there
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_timings_are_in_meta_info_with_metrics_and_the_timeline_on_demand(counted: Live) -> None:
    now = time.time()
    meta = counted.client.post("/generate", json=call("time", 4, return_timeline=True)).json()["meta_info"]
    assert abs(meta["request_received_ts"] - now) < 5
    assert meta["request_finished_ts"] - meta["request_received_ts"] == pytest.approx(meta["e2e_latency"], abs=1e-3)
    assert meta["queue_time"] >= 0 and meta["decode_throughput"] > 0
    assert 0 < meta["first_token_latency"] <= meta["e2e_latency"]
    line = meta["timeline"]
    order = [line[name] for name in ("received", "accepted", "admitted", "first_token", "finished")]
    assert order == sorted(order) and order[0] == 0.0 and order[-1] == pytest.approx(meta["e2e_latency"], abs=1e-3)
    assert line["replayed"] == []
    chunks = events(counted.client.post("/generate", json=call("time", 4, stream=True, return_timeline=True)))
    assert ["timeline" in chunk["meta_info"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_without_the_flag_there_are_no_metrics(live: Live) -> None:
    missing = live.client.get("/metrics")
    assert (missing.status_code, missing.json()) == (404, {"detail": "Not Found"})
    meta = live.client.post("/generate", json=call("x", return_timeline=True)).json()["meta_info"]
    assert meta["timeline"]["finished"] > 0 and "queue_time" not in meta
    assert live.client.get("/v1/loads").json()["loads"][0]["max_total_num_tokens"] == 4096


def test_hooks_and_histograms() -> None:
    metrics = Metrics()
    count_refused(metrics, "body_too_large")
    count_restart(metrics, "tokenizer", 3)
    count_replays(metrics, 5)
    assert (metrics.refused, metrics.restarts, metrics.epoch, metrics.replays) == (
        {"body_too_large": 1}, {"tokenizer": 1}, 3, 5,
    )  # fmt: skip
    histogram = Histogram((1.0, 2.0))
    for value, times in ((1.0, 2), (1.5, 1), (9.0, 3)):
        histogram.observe(value, times)
    assert (histogram.buckets(), histogram.total) == ([("1.0", 2), ("2.0", 3), ("+Inf", 6)], 30.5)
