"""The server's own description of its routes."""

from __future__ import annotations

import os
import re
import tempfile
from typing import Any

import msgspec
import pytest
import schemathesis
import zmq
from fake_ring import live_frontend, run_config

from http_frontend.app import _routes
from http_frontend.frontend import Frontend
from http_frontend.openapi import PAGES, describe


def document(**server: Any) -> tuple[set[tuple[str, str]], dict[str, Any]]:
    """(path, method) of every route, and the document."""
    with tempfile.TemporaryDirectory(prefix="tm") as folder, zmq.Context() as context:
        frontend = Frontend(run_config(folder, os.getpid(), enable_metrics=True, **server), context)
        routes = _routes(frontend)
        frontend.ring._inbox.close()
        for outbox in (frontend.ring._tokenizer, frontend.ring._detokenizer, frontend.ring._launcher):
            outbox.close(0)
    named = {(re.sub(r":\w+", "", route.path), method) for route in routes for method in route.methods or ()}
    return named, msgspec.json.decode(msgspec.json.encode(describe(routes, frontend.run.server)))


def test_every_route_is_described() -> None:
    routes, described = document()
    assert {(path, method.upper()) for path, item in described["paths"].items() for method in item} == routes
    assert set(PAGES) == set(described["paths"])
    schemathesis.openapi.from_dict(described).validate()  # against the schema of OpenAPI 3.1
    assert described["openapi"].startswith("3.1")
    operations = [operation for item in described["paths"].values() for operation in item.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations) > 50
    assert "securitySchemes" not in described["components"]
    assert all("401" not in operation["responses"] for operation in operations)


def test_keys_and_a_prefix() -> None:
    _, described = document(api_key="user", admin_api_key="boss", fastapi_root_path="/v9/")
    assert described["servers"] == [{"url": "/v9"}]
    assert set(described["components"]["securitySchemes"]) == {"ApiKey", "AdminKey"}
    keys = {
        path: item.get("post", item.get("get", {})).get("security") for path, item in described["paths"].items()
    }  # fmt: skip
    assert keys["/health"] is keys["/metrics"] is None
    assert keys["/generate"] == keys["/openapi.json"] == [{"ApiKey": []}]
    assert keys["/update_weights"] == [{"AdminKey": []}]
    assert "user" not in str(described).split() and "boss" not in str(described)


def test_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    with live_frontend(api_key="key") as live:
        assert live.client.get("/openapi.json").status_code == 401
        answer = live.client.get("/openapi.json", headers={"Authorization": "Bearer key"})
        assert answer.json()["info"]["title"] == "Tokenmill"
    monkeypatch.setenv("SGLANG_DISABLE_OPENAPI_DOC", "1")
    with live_frontend() as live:
        assert live.client.get("/openapi.json").status_code == 404


def test_routes_read_the_fields_that_the_document_names() -> None:
    """Each with a value of a wrong type: the refusal names it."""
    wrong = [[[{"nothing": "takes this"}]]]
    tried = 0
    with live_frontend(enable_metrics=True) as live:
        described = live.client.get("/openapi.json").json()
        components = described["components"]["schemas"]
        for path, item in described["paths"].items():
            for method, operation in item.items():
                if "requestBody" not in operation:
                    continue
                reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
                for name, field in components[reference.rpartition("/")[2]]["properties"].items():
                    kinds = field.get("anyOf", [field])
                    if any(not kind or (kind.get("type") == "array" and not kind.get("items")) for kind in kinds):
                        continue  # takes anything, or a list of anything
                    if set(field) <= {"default"}:
                        continue
                    answer = live.client.request(method, path, json={name: wrong})
                    said = answer.text.replace("SamplingParams", "sampling_params")
                    assert answer.status_code == 400 and name in said, (path, name, answer.text)
                    tried += 1
    assert tried > 200
