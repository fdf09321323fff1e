"""The manifest: what it names (flags, routes, ports, volumes) is there, and its times fit one another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.config.command_line import parse_serve
from engine.launcher.supervise import DRAIN_MARGIN, END_GRACE
from http_frontend.openapi import PAGES

Json = dict[str, Any]

MANIFEST = Path(__file__).resolve().parents[2] / "scripts" / "kubernetes" / "tokenmill.yaml"
OBJECTS: list[Json] = [document for document in yaml.safe_load_all(MANIFEST.read_text()) if document]
ROUTER_ROUTES = {"/liveness", "/readiness"}
"""Of sglang-router; tests/e2e/test_router.py asks for them."""


def find(kind: str, name: str) -> Json:
    (found,) = [one for one in OBJECTS if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def pod(name: str) -> Json:
    spec: Json = find("Deployment", name)["spec"]["template"]["spec"]
    return spec


def container(name: str) -> Json:
    (only,) = pod(name)["containers"]
    return only


def test_the_flags_of_the_server_are_real_and_the_times_fit() -> None:
    replica = container("tokenmill")
    parsed = parse_serve(replica["args"])
    assert parsed.warnings == []
    assert replica["command"] == ["tokenmill", "serve"]
    assert replica["ports"] == [{"name": "http", "containerPort": parsed.config.port}]
    assert parsed.config.host == "0.0.0.0"
    pause = int(replica["lifecycle"]["preStop"]["exec"]["command"][1])
    needed = pause + parsed.config.drain_timeout + DRAIN_MARGIN + END_GRACE
    assert pod("tokenmill")["terminationGracePeriodSeconds"] >= needed
    liveness = replica["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > parsed.config.drain_timeout


def test_probes_ask_for_routes_that_are_there() -> None:
    for name, routes in (("tokenmill", set(PAGES)), ("tokenmill-router", ROUTER_ROUTES)):
        one = container(name)
        ports = {port["name"] for port in one["ports"]}
        probes = [value["httpGet"] for key, value in one.items() if key.endswith("Probe")]
        assert len(probes) >= 2
        for probe in probes:
            assert probe["path"] in routes and probe["port"] in ports


@pytest.mark.parametrize("name", ["tokenmill", "tokenmill-router"])
def test_pods_are_confined_and_write_only_to_volumes(name: str) -> None:
    one, spec = container(name), pod(name)
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
    confined = one["securityContext"]
    assert confined["readOnlyRootFilesystem"] and not confined["allowPrivilegeEscalation"]
    assert confined["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in one["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in spec["volumes"]}
    for variable in one["env"]:  # all of them are folders
        assert variable["value"].startswith(tuple(mounts.values())), variable
    assert {"requests", "limits"} <= one["resources"].keys()


def test_selectors_find_their_pods() -> None:
    for name in ("tokenmill", "tokenmill-router"):
        spec = find("Deployment", name)["spec"]
        labels = spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"] == labels == find("Service", name)["spec"]["selector"]
        (port,) = find("Service", name)["spec"]["ports"]
        assert port["targetPort"] in {one["name"] for one in container(name)["ports"]}
    budget = find("PodDisruptionBudget", "tokenmill")["spec"]
    assert budget["selector"]["matchLabels"] == {"app": "tokenmill"}
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in pod("tokenmill")["volumes"][:1]]
    assert find("PersistentVolumeClaim", claims[0])
    assert find("ServiceAccount", pod("tokenmill-router")["serviceAccountName"])
    binding = find("RoleBinding", "tokenmill-router")
    assert find("Role", binding["roleRef"]["name"])["rules"][0]["resources"] == ["pods"]


def test_the_flags_of_the_router_are_real_and_find_the_replicas() -> None:
    """The router's own parser takes them: what it does not know, it would refuse."""
    pytest.importorskip("sglang_router")
    args = container("tokenmill-router")["args"]
    program = (
        "import sys; from sglang_router.launch_router import parse_router_args as parse; a = parse(sys.argv[1:]);"
        "print(a.port, a.service_discovery, a.service_discovery_port, a.selector, a.policy)"
    )
    told = subprocess.run(
        [sys.executable, "-c", program, *args], capture_output=True, text=True, check=True, timeout=60
    )
    port = container("tokenmill")["ports"][0]["containerPort"]
    assert told.stdout.split("\n")[0] == f"30000 True {port} {{'app': 'tokenmill'}} cache_aware"
