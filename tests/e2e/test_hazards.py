"""Deaths at the worst moments: of several processes at once, of one that is being born, and while an operator is at
work. What was asked is answered, once; what was set stays set."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from kills import Json, Running, another, decodes, drive, kill, pid_of, undisturbed, whole

from engine.bench.live_server import LiveServer, running_server

TOKENS = 150
FLAGS = ("--dtype", "float32", "--max-total-tokens", "60000", "--incremental-streaming-output", "--enable-metrics")
SAMPLES: Json = {
    "input_ids": list(range(5, 60)),
    "sampling_params": {"n": 3, "max_new_tokens": 200, "temperature": 0.8, "sampling_seed": 9, "ignore_eos": True},
}


@pytest.fixture(scope="module")
def live(tiny_model: Path) -> Iterator[LiveServer]:
    """A server that survives any number of deaths."""
    flags = ("--max-restarts", "100000", "--watchdog-timeout", "3", *FLAGS)
    with running_server(*flags, model=tiny_model, env={"TOKENMILL_STRICT": "1"}) as live:
        yield live


@pytest.fixture(scope="module")
def expected(live: LiveServer) -> list[Json]:
    return drive(live, lambda http: undisturbed(http, decodes(TOKENS)))


async def idle(http: httpx.AsyncClient) -> None:
    """Wait until nothing is left in the scheduler."""
    deadline = time.monotonic() + 30
    while True:
        state = (await http.get("/server_info")).json()["internal_states"][0]
        if not (state["num_running_reqs"] or state["num_waiting_reqs"] or state["num_used_tokens"]):
            return
        assert time.monotonic() < deadline, state
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("newborn", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_several_at_once(live: LiveServer, expected: list[Json], newborn: bool) -> None:
    """All but the frontend; then those that take their places, before they are ready."""

    async def work(http: httpx.AsyncClient) -> None:
        running = Running(http, decodes(TOKENS))
        await running.decoding(5)
        dead = {process: kill(live, process, signal.SIGKILL) for process in ("tokenizer", "scheduler", "detokenizer")}
        if newborn:
            for process in ("scheduler", "tokenizer"):
                await another(live, process, dead[process])
                kill(live, process, signal.SIGKILL)
        assert await running.answers() == expected
        await idle(http)

    drive(live, work)


@pytest.mark.slow
def test_samples_questions_and_hang_ups(live: LiveServer) -> None:
    """In flight at the death of the scheduler, and while the tokenizer is away: samples, a score, a flush, a profile,
    a tokenization, an abort, a client that leaves."""
    score = {"query": [5, 6, 7], "items": [[8, 9], [10, 11]], "label_token_ids": [20, 30], "apply_softmax": True}
    endless = {"input_ids": [7, 8, 9], "sampling_params": {"max_new_tokens": 15000, "ignore_eos": True}}

    async def work(http: httpx.AsyncClient, process: str) -> list[Any]:
        post = lambda path, body=None: asyncio.create_task(http.post(path, json=body))  # noqa: E731
        samples, aborted = post("/generate", SAMPLES), post("/generate", {"rid": "abort-me", **endless})
        left = post("/generate", endless)
        await asyncio.sleep(0.15)
        kill(live, process, signal.SIGKILL)
        asked = [
            post("/v1/score", score),
            post("/tokenize", {"prompt": "abc def"}),
            post("/pause_generation", {"mode": "retract"}),
        ]
        left.cancel()
        while (await http.get("/health")).status_code == 200:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        await http.post("/abort_request", json={"rid": "abort-me"})
        told = (await aborted).json()["meta_info"]["finish_reason"]
        assert told["type"] == "abort", told
        assert (await asked[2]).status_code == 200
        assert (await http.post("/continue_generation", json={})).status_code == 200
        answers = [(await one).json() for one in (samples, *asked[:2])]
        await whole(http)
        await idle(http)
        assert (await http.post("/flush_cache?timeout=10")).status_code == 200
        return [[one["output_ids"] for one in answers[0]], answers[1]["scores"], answers[2]["tokens"]]

    async def calm(http: httpx.AsyncClient) -> list[Any]:
        samples = (await http.post("/generate", json=SAMPLES)).json()
        scores = (await http.post("/v1/score", json=score)).json()["scores"]
        tokens = (await http.post("/tokenize", json={"prompt": "abc def"})).json()["tokens"]
        return [[one["output_ids"] for one in samples], scores, tokens]

    wanted = drive(live, calm)
    for process in ("scheduler", "tokenizer"):
        assert drive(live, lambda http, process=process: work(http, process)) == wanted, process


@pytest.mark.slow
@pytest.mark.parametrize("process", ["scheduler", "tokenizer"])
def test_a_profile_and_a_flush_that_wait(live: LiveServer, tmp_path: Path, process: str) -> None:
    """Both are answered once the requests before them are: the profile by the scheduler that counts its steps."""

    async def work(http: httpx.AsyncClient) -> None:
        running = Running(http, decodes(600)[:8])
        await running.decoding(3)
        body = {"output_dir": str(tmp_path), "num_steps": 100, "profile_id": "p"}
        profile = asyncio.create_task(http.post("/start_profile", json=body))
        flush = asyncio.create_task(http.post("/flush_cache?timeout=60"))
        await asyncio.sleep(0.02)
        kill(live, process, signal.SIGKILL)
        await running.answers()
        assert (await profile).status_code == 200 and (await flush).status_code == 200
        assert (tmp_path / "p-TP-0.trace.json.gz").exists()
        again = await http.post("/stop_profile")
        assert again.status_code == 400 and "not in progress" in again.text

    drive(live, work)


@pytest.mark.slow
def test_what_an_operator_has_set_outlives_every_process(live: LiveServer) -> None:
    """Each by itself, and the frontend together with the scheduler: then nobody is left who has been told of it."""
    slow: Json = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 5, "temperature": 0}}

    async def work(http: httpx.AsyncClient) -> None:
        await http.post(
            "/configure_logging", json={"log_level": "debug", "log_requests": True, "log_requests_level": 1}
        )
        await http.post("/slow_down", json={"forward_sleep_time": 0.2})
        await http.post("/pause_generation", json={"mode": "in_place"})
        for dead in (("tokenizer",), ("detokenizer",), ("scheduler",), ("frontend",), ("frontend", "scheduler")):
            pids = {process: kill(live, process, signal.SIGKILL) for process in dead}
            for process, pid in pids.items():
                await another(live, process, pid)
            while True:
                try:
                    if (await http.get("/ping")).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.02)
            assert (await http.get("/ready")).status_code == 503, dead  # paused
            log_size = len(live.log())
            call = asyncio.create_task(http.post("/generate", json=slow | {"rid": "+".join(dead)}))
            await asyncio.sleep(0.3)
            assert not call.done()
            await http.post("/continue_generation", json={})
            began = time.monotonic()
            assert (await call).status_code == 200
            assert time.monotonic() - began > 0.9  # five steps, each after a sleep
            await http.post("/pause_generation", json={"mode": "in_place"})
            log = live.log()[log_size:]
            for words in ("Finish: rid=" + "+".join(dead), "waits: 3 tokens", "accepted: 3 tokens", "first output"):
                assert words in log, (dead, words)
        await http.post("/continue_generation", json={})
        await http.post("/slow_down", json={"forward_sleep_time": 0})
        await http.post("/configure_logging", json={"log_level": "info", "log_requests": False})
        assert (await http.get("/ready")).status_code == 200

    drive(live, work)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["scheduler", "tokenizer"])
def test_sigterm_in_the_midst_of_a_restart(tiny_model: Path, first: str) -> None:
    """The drain waits for the process that is being replaced: whatever was in flight finishes, and the end is clean."""
    with running_server(*FLAGS, model=tiny_model) as live:

        async def work(http: httpx.AsyncClient) -> None:
            wanted = await undisturbed(http, decodes(TOKENS)[:6])
            running = Running(http, decodes(TOKENS)[:6])
            await running.decoding(5)
            kill(live, first, signal.SIGKILL)
            live.launcher.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            if first == "tokenizer" and pid_of(live, "detokenizer") is not None:
                kill(live, "detokenizer", signal.SIGKILL)
            assert await running.answers() == wanted

        drive(live, work)
        assert live.launcher.wait(60) == 0, live.log()
