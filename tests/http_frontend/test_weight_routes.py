"""Weight updates, versions and pauses, as the frontend takes them to the scheduler and tells of them afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fake_ring import Live, call, live_frontend

from engine.wire.weights import PauseGeneration, ReadWeights, SetWeightVersion, UpdateWeights


@pytest.fixture
def own() -> Iterator[Live]:
    """A frontend of the test's own: what these routes change stays changed."""
    with live_frontend(served_model_name="alias") as one:
        yield one


def test_an_update_renames_the_model(own: Live) -> None:
    client = own.client
    body = {
        "model_path": "org/new", "weight_version": "v1", "keep_pause": "false", "token_step": "7", "flush_cache": 0,
        "load_format": None, "manifest": {"any": [1]}, "unknown": 1, "is_async": True,
    }  # fmt: skip
    done = client.post("/update_weights_from_disk", json=body)
    assert (done.status_code, done.json()) == (
        200,
        {"success": True, "message": "what the scheduler says", "num_paused_requests": 0},
    )
    sent = own.ring.kinds(UpdateWeights)[-1]
    assert sent == UpdateWeights(key=sent.key, model_path="org/new", weight_version="v1", flush_cache=False)
    info = client.get("/model_info").json()
    assert (info["model_path"], info["tokenizer_path"], info["weight_version"]) == ("org/new", "org/model-x", "v1")
    server = client.get("/server_info").json()
    for facts in (server, server["internal_states"][0]):
        assert (facts["model_path"], facts["served_model_name"], facts["weight_version"]) == (
            "org/new",
            "org/new",
            "v1",
        )
        assert facts["tokenizer_path"] == "org/model-x"
    assert client.get("/v1/models").json()["data"][0]["id"] == "org/new"
    assert client.post("/generate", json=call("a")).json()["meta_info"]["weight_version"] == "v1"

    failed = client.post("/update_weights", json={"model_path": "WRONG", "weight_version": "v2"})
    assert (failed.status_code, failed.json()["success"]) == (400, False)
    assert client.get("/model_info").json() == info
    for wrong in (
        {},
        {"model_path": 1},
        {"model_path": "a", "flush_cache": "maybe"},
        {"model_path": "a", "manifest": 1},
    ):
        refused = client.post("/update_weights", json=wrong)
        assert (refused.status_code, refused.json()["type"]) == (400, "Bad Request")
        assert ("Field required" in refused.json()["message"]) == (wrong == {})
    assert "Field required" in client.post("/update_weights").json()["message"]
    assert client.get("/update_weights").status_code == 405


def test_what_fails_in_the_scheduler_is_a_500_that_says_so() -> None:
    words = "internal error: it is broken"
    with live_frontend(expert_distribution_recorder_mode="stat", enable_metrics=True) as live:
        live.ring.broken.set()
        for method, path, body in (
            ("GET", "/server_info", None), ("POST", "/flush_cache", None), ("POST", "/start_profile", None),
            ("POST", "/stop_profile", None), ("POST", "/start_expert_distribution_record", None),
            ("POST", "/dump_expert_distribution_record", None), ("POST", "/get_weights_by_name", {"name": "w"}),
            ("POST", "/update_weight_version", {"new_version": "2"}), ("POST", "/pause_generation", {}),
            ("POST", "/continue_generation", {}),
        ):  # fmt: skip
            answer = live.client.request(method, path, json=body)
            assert (answer.status_code, answer.json()) == (500, {"error": {"message": words}}), path
        updated = live.client.post("/update_weights_from_disk", json={"model_path": "org/new"})
        assert (updated.status_code, updated.json()["success"], updated.json()["message"]) == (500, False, words)
        assert live.client.get("/health").status_code == live.client.get("/metrics").status_code == 200
        live.ring.broken.clear()
        assert live.client.get("/server_info").json()["status"] == "ready"
        assert live.client.post("/flush_cache").status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "aborts"),
    [
        ("/update_weights", {"model_path": "org/new"}, False),
        ("/update_weights", {"model_path": "org/new", "abort_all_requests": True}, True),
        ("/update_weight_version", {"new_version": "X", "abort_all_requests": False}, False),
        ("/update_weight_version", {"new_version": "X"}, True),
        ("/pause_generation", {"mode": "retract"}, False),
        ("/pause_generation", {}, True),
    ],
)
def test_who_is_aborted_first(path: str, body: dict[str, Any], aborts: bool, own: Live) -> None:
    own.ring.hold.set()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(own.client.post, "/generate", json=call("a"))
        own.ring.wait_for(lambda: bool(own.ring.running))
        done = own.client.post(path, json=body)
        assert done.status_code == 200
        own.ring.hold.clear()
        finish = running.result().json()["meta_info"]["finish_reason"]
    assert finish["type"] == ("abort" if aborts else "length")
    assert len(own.ring.aborted()) == aborts


def test_versions_and_tensors(own: Live) -> None:
    client = own.client
    done = client.post("/update_weight_version", json={"new_version": "X"})
    assert done.json() == {"success": True, "message": "Weight version updated to X", "new_version": "X"}
    assert own.ring.kinds(SetWeightVersion)[-1].weight_version == "X"
    assert client.get("/model_info").json()["weight_version"] == "X"
    assert "Field required" in client.post("/update_weight_version", json={}).json()["message"]
    for method in ("GET", "POST"):
        rows = client.request(method, "/get_weights_by_name", json={"name": "w", "truncate_size": "2"})
        assert rows.json() == [[0.5, 1.0]] * 2
    assert client.post("/get_weights_by_name", json={"name": "nope"}).json() == {
        "error": {"message": "Get parameter by name failed"}
    }
    assert own.ring.kinds(ReadWeights)[-1].rows == 100


def test_pauses_show_in_ready_only(own: Live) -> None:
    client = own.client

    def health() -> list[int]:
        return [client.get(path).status_code for path in ("/ready", "/ping", "/health", "/health_generate")]

    assert health() == [200] * 4
    for mode in ("abort", "retract", "in_place"):
        done = client.post("/pause_generation", json={"mode": mode})
        assert done.json() == {"message": "Generation paused successfully.", "status": "ok"}
        assert own.ring.kinds(PauseGeneration)[-1].mode == mode
    assert health() == [503, 200, 200, 200]
    for _ in range(2):
        done = client.post("/continue_generation", json={"torch_empty_cache": True})
        assert done.json() == {"message": "Generation continued successfully.", "status": "ok"}
    assert health() == [200] * 4
    for wrong in ({"mode": "later"}, {"mode": None}):
        assert client.post("/pause_generation", json=wrong).json()["type"] == "Bad Request"
    client.post("/update_weights", json={"model_path": "org/new", "keep_pause": True})
    assert health() == [503, 200, 200, 200]


def test_admin_routes() -> None:
    paths = ("/update_weights_from_disk", "/update_weights", "/update_weight_version", "/get_weights_by_name")
    with live_frontend(api_key="user", admin_api_key="admin") as one:
        for path in (*paths, "/pause_generation", "/continue_generation"):
            codes = [
                one.client.post(path, json={"mode": 1}, headers={"Authorization": f"Bearer {key}"}).status_code
                for key in ("user", "admin")
            ]
            assert codes[0] == 401 and codes[1] in (200, 400), path
