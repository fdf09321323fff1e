"""Weights, the cache and records of experts, where the ranks of a model are on two machines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from live_client import Api
from test_hosts import FLAGS, answers, rank_of, two_machines
from test_ranks import pid_of_rank
from tiny_models import tiny_llama, tiny_qwen2_moe, upside_down

from engine.bench.live_server import LiveServer, running_server

PATIENCE = 90.0


def again(server: LiveServer, machine: psutil.Process, gone: set[int]) -> None:
    """Wait until other processes than `gone` are both ranks."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            if not gone & {pid_of_rank(server, 0), rank_of(machine).pid, None}:
                return
        except (StopIteration, psutil.NoSuchProcess):
            pass
        assert time.monotonic() < until, server.log()
        time.sleep(0.05)


def pids(server: LiveServer, machine: psutil.Process) -> set[int]:
    first = pid_of_rank(server, 0)
    assert first is not None, server.log()
    return {first, rank_of(machine).pid}


def update(server: LiveServer, model: Path) -> dict[str, Any]:
    told: dict[str, Any] = Api(server.url).post({"model_path": str(model)}, "/update_weights_from_disk").json()
    return told


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("weights")
    old = tiny_llama(folder / "old")
    return old, upside_down(old, folder / "new")


@pytest.fixture(scope="module")
def wanted(checkpoints: tuple[Path, Path]) -> list[Any]:
    """What one rank answers with each of them."""
    found = []
    for model in checkpoints:
        with running_server(*FLAGS, model=model) as alone:
            found.append(answers(alone))
    assert found[0] != found[1]
    return found


def test_updated_weights_outlive_the_ranks_of_both_machines(
    checkpoints: tuple[Path, Path], wanted: list[Any], tmp_path: Path
) -> None:
    old, new = checkpoints
    with two_machines(old, tmp_path) as (server, machine, log):
        api = Api(server.url)
        assert answers(server) == wanted[0]
        assert update(server, new)["success"], server.log()
        assert answers(server) == wanted[1]
        before = pids(server, machine)
        rank_of(machine).kill()
        again(server, machine, before)
        assert answers(server) == wanted[1], "after the death of the other machine's rank"
        assert str(new) in log.read_text()
        assert not update(server, tmp_path / "nowhere")["success"]
        assert answers(server) == wanted[1], "after an update that was refused"
        assert api.http.post("/flush_cache").status_code == 200
        (state,) = api.http.get("/server_info").json()["internal_states"]
        assert (state["num_cached_tokens"], state["num_used_tokens"]) == (0, 0)
        assert answers(server) == wanted[1]
        assert update(server, old)["success"], server.log()
        assert answers(server) == wanted[0]


def test_each_machine_writes_its_record_of_experts(tmp_path: Path) -> None:
    model, out = tiny_qwen2_moe(tmp_path / "model"), tmp_path / "records"
    recording = ("--expert-distribution-recorder-mode", "stat", "--expert-distribution-recorder-dir", str(out))
    with two_machines(model, tmp_path, *recording) as (server, machine, _):
        api = Api(server.url)
        api.http.post("/start_expert_distribution_record").raise_for_status()
        api.generate(input_ids=list(range(20, 60)), sampling_params={"temperature": 0, "max_new_tokens": 6})
        before = pids(server, machine)
        rank_of(machine).kill()
        again(server, machine, before)
        api.generate(input_ids=list(range(70, 90)), sampling_params={"temperature": 0, "max_new_tokens": 6})
        api.http.post("/stop_expert_distribution_record").raise_for_status()
        api.http.post("/dump_expert_distribution_record").raise_for_status()
    contents = []
    for rank in (0, 1):
        (path,) = out.glob(f"expert_distribution_rank{rank}_timestamp*.csv")
        contents.append(path.read_text())
    assert contents[0] == contents[1]
    assert sum(int(line.rsplit(",", 1)[1]) for line in contents[0].splitlines()[1:]) > 0
