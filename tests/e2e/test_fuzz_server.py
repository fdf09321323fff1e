"""Requests that schemathesis makes of a live server's own document."""

from __future__ import annotations

from live_client import Api

from tests.openapi_cases import fuzz

WITHOUT = {
    "/update_weights_from_disk": "replaces the weights of the server that other tests use",
    "/update_weights": "the same",
    "/update_weight_version": "renames them",
    "/pause_generation": "nothing would be answered until it is continued",
    "/continue_generation": "there is no pause",
    "/slow_down": "up to a minute of sleep before each step",
    "/start_profile": "writes to folders of the machine",
    "/stop_profile": "the same",
    "/configure_logging": "changes what the server logs from then on",
    "/freeze_gc": "what lives then is never collected",
}
"""Path → why it is left out: what it does is wanted, and would last."""


def test_a_live_server(tiny_api: Api) -> None:
    statuses = fuzz(str(tiny_api.http.base_url).rstrip("/"), 8, without=WITHOUT)
    assert statuses[200] and statuses[400] and statuses.total() > 300, statuses
    tiny_api.wait_idle()
    assert tiny_api.http.get("/health_generate").status_code == 200
