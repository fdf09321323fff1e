"""A whole server's secrets and files, as another user of the machine could see them."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from engine.bench.live_server import LiveServer, running_server

KEYS = ("oboe-sunday", "viola-monday")
BOSS = {"Authorization": f"Bearer {KEYS[1]}"}
USER = {"Authorization": f"Bearer {KEYS[0]}"}


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder with a path that is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="tm-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[LiveServer]:
    """One whose umask would let everybody in, and which writes all that a server writes."""
    before = os.umask(0)
    try:
        flags = ["--api-key", KEYS[0], f"--admin-api-key={KEYS[1]}", "--log-level", "debug"]
        logs = ["--log-requests", "--log-requests-target", str(place / "requests")]
        with running_server(*flags, *logs, env={"TMPDIR": str(place), "XDG_RUNTIME_DIR": str(place)}) as one:
            os.umask(before)
            yield one
    finally:
        os.umask(before)


def test_keys_are_shown_nowhere(server: LiveServer) -> None:
    family = [psutil.Process(pid) for pid in server.pids.values()]
    family += psutil.Process(server.launcher.pid).children(recursive=True)
    for process in family:
        shown = " ".join([process.name(), *process.cmdline()])
        assert shown.startswith("tokenmill: ") and not any(key in shown for key in KEYS), shown
    with httpx.Client(base_url=server.url, headers=USER, timeout=60) as client:
        told = client.get("/get_server_info")
        assert told.status_code == 200 and "--admin-api-key" in told.text
        for path in ("/get_model_info", "/v1/models", "/v1/loads"):
            assert not any(key in client.get(path).text for key in KEYS)
        wrong = client.get("/v1/models", headers={"Authorization": f"Bearer {KEYS[0]}x"})
        assert wrong.status_code == 401
    assert not any(key in text for key in KEYS for text in (told.text, wrong.text, server.log()))


def test_files_are_the_users_alone(server: LiveServer, place: Path) -> None:
    with httpx.Client(base_url=server.url, headers=USER, timeout=60) as client:
        profile = {"output_dir": str(place / "profile"), "num_steps": 1}
        body = {"text": "a", "sampling_params": {"max_new_tokens": 2}}
        started = client.post("/start_profile", json=profile | {"num_steps": None}, headers=BOSS)
        assert started.status_code == 200, started.text
        assert client.post("/generate", json=body).status_code == 200
        assert client.post("/stop_profile", headers=BOSS).status_code == 200
        assert client.post("/update_weight_version", json={"new_version": "2"}, headers=BOSS).status_code == 200
        assert client.post("/slow_down", json={"forward_sleep_time": 0.001}, headers=BOSS).status_code == 200
    found: dict[str, int] = {}
    for path in place.rglob("*"):
        mode = stat.S_IMODE(path.lstat().st_mode)
        if path.is_dir():
            assert mode == 0o700, f"{path}: {mode:o}"
        elif path.is_file():
            found[path.name] = mode
    names = " ".join(found)
    for name in ("config.json", "board", "lock", "served.json", "standing.json", "trace.json.gz", "requests-"):
        assert name in names, names
    assert {name: f"{mode:o}" for name, mode in found.items() if mode != 0o600} == {}
