"""Requests that schemathesis makes of the server's own document: every route of the frontend, before a ring of fakes,
so that nothing they ask for is done to a machine or a model."""

from __future__ import annotations

import tempfile
from collections import Counter

import pytest
from fake_ring import live_frontend

from tests.mutations import cases
from tests.openapi_cases import fuzz


def fuzz_frontend(most: int) -> Counter[int]:
    """Up to `most` good and bad requests of each operation; the frontend is well afterwards, and holds nothing."""
    with (
        tempfile.TemporaryFile() as log,
        live_frontend(enable_metrics=True, expert_distribution_recorder_mode="stat", stderr=log) as live,
    ):
        live.ring.most_tokens = 8
        statuses = fuzz(f"http://127.0.0.1:{live.port}", most)
        live.client.post("/continue_generation", json={})
        live.ring.wait_for(lambda: not live.ring.running)
        assert live.process.poll() is None
        assert live.client.get("/health_generate").status_code == 200
        answer = live.client.post("/generate", json={"text": "abc", "sampling_params": {"max_new_tokens": 3}})
        assert answer.json()["output_ids"] == [3, 4, 5]
        loads = live.client.get("/v1/loads").json()["loads"][0]
        assert (loads["num_running_reqs"], loads["num_waiting_reqs"]) == (0, 0)
        log.seek(0)
        traces = [line for line in log if line.startswith(b"Traceback")]
        assert not traces, f"{len(traces)} tracebacks are in the log"
    assert statuses[200] and statuses[400]
    return statuses


def test_some_requests() -> None:
    assert fuzz_frontend(8).total() > 400


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(3_600)
def test_ten_thousand_requests() -> None:
    statuses = fuzz_frontend(cases(210))
    assert statuses.total() >= 10_000, statuses
    print(statuses)
