"""Two thousand requests from 64 clients, a fifth of them abandoned: the others right, nothing leaked. And the soak, in
which processes are killed as well."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from oracle import check_greedy
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

from engine.bench.live_server import LiveServer, running_server

ROOT = Path(__file__).parents[2]
REQUESTS = 2_000
CLIENTS = 64
WARM_UP = 500
POOL = 800
"""Slots: too few for all that the clients ask for at once, so that requests wait and are preempted."""
MEMORY_SLACK = 24 << 20
"""Bytes that a process may grow after the warm-up: allocator noise, far below one leaked answer a request."""


async def _client(server: LiveServer, http: httpx.AsyncClient, jobs: list[dict[str, Any]], done: list[Any]) -> None:
    while jobs:
        job = jobs.pop()
        fate = job["fate"]
        body = {
            "rid": job["rid"],
            "input_ids": job["prompt"],
            "stream": fate != "plain",
            "sampling_params": {"temperature": 0, "max_new_tokens": job["new"], "ignore_eos": True},
        }
        if fate == "plain":
            done.append((job, (await http.post("/generate", json=body)).json()))
            continue
        last: dict[str, Any] = {}
        async with http.stream("POST", "/generate", json=body) as answer:
            chunks = 0
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    last = json.loads(line.removeprefix("data: "))
                    chunks += 1
                if chunks == 3 and fate == "disconnect":
                    break
                if chunks == 3 and fate == "abort":
                    fate = "aborted"
                    await http.post("/abort_request", json={"rid": job["rid"]})
        done.append((job, last))


def _jobs(count: int, seed: int) -> list[dict[str, Any]]:
    source = random.Random(seed)
    shared = [[source.randrange(3, 250) for _ in range(40)] for _ in range(8)]
    jobs = []
    for number in range(count):
        prefix = source.choice(shared)[: source.randrange(41)]
        prompt = prefix + [source.randrange(3, 250) for _ in range(source.randrange(1, 40))]
        fate = source.choices(["plain", "stream", "disconnect", "abort"], [0.4, 0.4, 0.1, 0.1])[0]
        new = source.randrange(1, 32) if fate in ("plain", "stream") else source.randrange(150, 300)
        jobs.append({"rid": f"{seed}-{number}-", "prompt": prompt, "new": new, "fate": fate})
    return jobs


async def _drive(server: LiveServer, jobs: list[dict[str, Any]]) -> list[Any]:
    done: list[Any] = []
    # No connection is used twice: a client that is late to read an answer, on a busy machine, would ask again on one
    # that the server is about to drop as idle (5 s), and lose its request.
    limits = httpx.Limits(max_connections=CLIENTS * 2, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
        await asyncio.gather(*(_client(server, http, jobs, done) for _ in range(CLIENTS)))
    return done


def _footprint(server: LiveServer) -> dict[str, tuple[int, int]]:
    """Resident bytes and descriptors of each process, once the frontend has noticed that all clients have gone."""
    frontend = psutil.Process(server.pids["frontend"])
    deadline = time.monotonic() + 10
    while any(c.status == psutil.CONN_ESTABLISHED for c in frontend.net_connections("tcp")):
        assert time.monotonic() < deadline, "connections stay open"
        time.sleep(0.02)  # the kernel tells the frontend, not us
    processes = {name: psutil.Process(pid) for name, pid in server.pids.items()}
    return {name: (process.memory_info().rss, process.num_fds()) for name, process in processes.items()}


def test_soak(tmp_path: Path) -> None:
    model_path = tiny_llama(tmp_path / "model")
    flags = ("--dtype", "float32", "--max-total-tokens", str(POOL), "--log-level", "warning")
    with running_server(*flags, model=model_path, env={"TOKENMILL_STRICT": "1"}) as server:
        asyncio.run(_drive(server, _jobs(WARM_UP, seed=1)))
        before = _footprint(server)
        done = asyncio.run(_drive(server, _jobs(REQUESTS, seed=2)))
        assert len(done) == REQUESTS
        with httpx.Client(base_url=server.url, timeout=30) as http:
            assert http.get("/health_generate").status_code == 200
            assert http.post("/flush_cache").status_code == 200
            state = http.get("/server_info").json()["internal_states"][0]
            assert state["num_running_reqs"] == state["num_waiting_reqs"] == state["num_used_tokens"] == 0
            assert state["num_free_tokens"] == POOL
        after = _footprint(server)
    for name, (memory, descriptors) in after.items():
        assert memory - before[name][0] < MEMORY_SLACK, f"{name} grew by {(memory - before[name][0]) >> 10} KiB"
        assert descriptors <= before[name][1] + 2, f"{name} has {descriptors} descriptors, {before[name][1]} before"
    _judge(model_path, done)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(900)
def test_two_minutes_of_kills(tiny_model: Path) -> None:
    """The short form of `make soak`, with a model so small that it asks and kills as often as it can."""
    words = ("--minutes", "2", "--kill-every", "10", "--quiet-every", "20", "--model", str(tiny_model))
    command = [sys.executable, "-m", "scripts.soak", *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as soak:
        try:
            said, _ = soak.communicate()
        finally:
            if soak.poll() is None:
                soak.send_signal(signal.SIGINT)  # it ends its server, which would otherwise stay behind
    print(said)
    assert soak.returncode == 0, said


@pytest.mark.parametrize(
    ("when", "number"),
    [
        ("seed", signal.SIGTERM),
        ("seed", signal.SIGINT),
        pytest.param("oracle", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_soak_that_is_stopped_leaves_nothing_behind(tiny_model: Path, when: str, number: signal.Signals) -> None:
    """While its server starts, and while its clients ask."""
    words = ("--minutes", "5", "--kill-every", "0", "--model", str(tiny_model))
    command = [sys.executable, "-u", "-m", "scripts.soak", *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as soak:
        assert soak.stdout is not None
        try:
            while when not in (line := soak.stdout.readline()):
                assert line, "the soak has ended by itself"
            time.sleep(0.5)
            family = psutil.Process(soak.pid).children(recursive=True)
            assert len(family) == 5 if when == "oracle" else family
            soak.send_signal(number)
            said, _ = soak.communicate(timeout=60)
        finally:
            if soak.poll() is None:
                soak.send_signal(signal.SIGINT)
    assert soak.returncode == 1 and "stopped" in said and "Traceback" not in said
    assert not [process for process in family if process.is_running()]


def _judge(model_path: Path, done: list[Any]) -> None:
    torch.set_num_threads(2)
    oracle = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    for job, answer in done:
        finish = answer["meta_info"]["finish_reason"]
        output = answer["output_ids"]
        if job["fate"] in ("plain", "stream"):
            assert finish == {"type": "length", "length": job["new"]} and len(output) == job["new"]
        elif job["fate"] == "abort":
            assert finish["type"] in ("abort", "length")
        check_greedy(oracle, job["prompt"], output, None)
