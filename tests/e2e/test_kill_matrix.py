"""Any process may die at any moment: requests go on where they stood, and come to what they would have come to."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from kills import Json, Running, another, decodes, drive, kill, pid_of, prefills, undisturbed, whole
from poisoned_scheduler import POISON

from engine.bench.live_server import LiveServer, running_server

TOKENS = 250
SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV)
PROCESSES = ("tokenizer", "scheduler", "detokenizer")
FLAGS = ("--dtype", "float32", "--max-total-tokens", "60000", "--incremental-streaming-output")
PAUSE_LIMIT = 100.0
"""Seconds: generous, for a machine that does other things as well."""
UNMARKED = {
    ("decode", "scheduler", signal.SIGKILL),
    ("decode", "detokenizer", signal.SIGKILL),
    ("decode", "tokenizer", signal.SIGSTOP),
    ("update", "scheduler", signal.SIGKILL),
    ("twice", "scheduler", signal.SIGSEGV),
}


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, list[str]]]:
    """A server that survives any number of deaths, and two folders with the same weights."""
    same = tmp_path_factory.mktemp("same") / "model"
    shutil.copytree(tiny_model, same)
    flags = ("--watchdog-timeout", "2", "--max-restarts", "100000", *FLAGS)
    with running_server(*flags, model=tiny_model, env={"TOKENMILL_STRICT": "1", "HF_HUB_OFFLINE": "1"}) as server:
        yield server, [str(same), str(tiny_model)]


@pytest.fixture(scope="module")
def expected(server: tuple[LiveServer, list[str]]) -> list[Json]:
    return drive(server[0], lambda http: undisturbed(http, decodes(TOKENS)))


def cells() -> Iterator[Any]:
    for moment in ("idle", "prefill", "decode", "update", "twice"):
        for process in PROCESSES:
            for number in SIGNALS:
                marks = () if (moment, process, number) in UNMARKED else (pytest.mark.slow,)
                yield pytest.param(moment, process, number, id=f"{moment}-{process}-{number.name}", marks=marks)


@pytest.mark.parametrize(("moment", "process", "number"), list(cells()))
def test_nothing_is_lost(
    server: tuple[LiveServer, list[str]], expected: list[Json], moment: str, process: str, number: signal.Signals
) -> None:
    live, folders = server
    log_size = len(live.log())

    async def work(http: httpx.AsyncClient) -> float:
        if moment == "prefill":
            return await _killed_in_prefill(http, live, process, number)
        if moment == "idle":
            kill(live, process, number)
        running = Running(http, decodes(TOKENS))
        update = None
        if moment != "idle":
            await running.decoding(5)
            if moment == "update":
                update = asyncio.create_task(http.post("/update_weights", json={"model_path": folders[0]}))
                await asyncio.sleep(0.02)
            pid = kill(live, process, number)
            if moment == "twice":
                await another(live, process, pid)
                await running.progress()  # the streams have just gone on, perhaps in the midst of a trial
                kill(live, process, number)
        answers = await running.answers()
        for index, (found, wanted) in enumerate(zip(answers, expected, strict=True)):
            assert found == wanted, index
        if update is not None:
            told = (await update).json()
            assert told["success"], told
            folders.reverse()
            assert (await http.get("/model_info")).json()["model_path"] == folders[1]
        return running.pause

    pause = drive(live, work)
    replays = [int(count) for count in re.findall(r"whole again: (\d+) requests", live.log()[log_size:])]
    print(f"pause of {moment}, {process}, {number.name}: {pause:.2f} s; replayed {replays}")
    # Requests in their prefill, and without the tokenizer all that run, may come to their end before the replay.
    if moment in ("decode", "twice") and process != "tokenizer":
        assert max(replays) >= 3
    assert pause < PAUSE_LIMIT
    _check_clean(live)


async def _killed_in_prefill(http: httpx.AsyncClient, live: LiveServer, process: str, number: signal.Signals) -> float:
    """Returns by how much longer than otherwise the first token took."""
    bodies = prefills(8)
    running = Running(http, bodies)
    await asyncio.sleep(0.1)
    kill(live, process, number)
    answers = await running.answers()
    await http.post("/flush_cache?timeout=20")
    plain = Running(http, bodies)
    assert answers == await plain.answers()
    return running.pause - plain.pause


def _check_clean(live: LiveServer) -> None:
    """Nothing is left behind in the scheduler (whose strict checks have held all along)."""

    async def work(http: httpx.AsyncClient) -> None:
        deadline = time.monotonic() + 20
        while True:
            state = (await http.get("/server_info")).json()["internal_states"][0]
            if not (state["num_running_reqs"] or state["num_waiting_reqs"] or state["num_used_tokens"]):
                return
            assert time.monotonic() < deadline, state
            await asyncio.sleep(0.05)

    drive(live, work)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_frontend_that_dies_takes_its_connections_and_nothing_else(
    server: tuple[LiveServer, list[str]], expected: list[Json], number: signal.Signals
) -> None:
    """New connections are served within seconds, and no orphan goes on computing."""
    live, _ = server
    bodies = decodes(TOKENS)
    for body in bodies:
        body["sampling_params"]["max_new_tokens"] = 10_000
    others = {process: pid_of(live, process) for process in PROCESSES}

    async def work(http: httpx.AsyncClient) -> float:
        running = Running(http, bodies)
        await running.decoding(5)
        began = time.monotonic()
        kill(live, "frontend", number)
        with pytest.raises(httpx.TransportError):
            await running.answers()
        await whole(http)
        return time.monotonic() - began

    pause = drive(live, work)
    print(f"pause of the frontend, {number.name}: {pause:.2f} s")
    assert pause < PAUSE_LIMIT
    _check_clean(live)
    assert {process: pid_of(live, process) for process in PROCESSES} == others
    assert drive(live, lambda http: undisturbed(http, decodes(TOKENS))) == expected


def test_a_poisonous_request_is_found_and_the_others_go_on(tiny_model: Path, expected: list[Json]) -> None:
    """Its step kills the scheduler in company, then on trial; that is the last of it."""
    here = Path(__file__).parent
    program = (str(here / "poisoned_tree.py"),)
    flags = ("--skip-server-warmup", *FLAGS)
    environment = {"PYTHONPATH": f"{here}:{here.parents[1]}", "TOKENMILL_STRICT": "1"}
    with running_server(*flags, model=tiny_model, program=program, env=environment) as live:
        bodies = [body for body in decodes(TOKENS) if POISON not in body["input_ids"]]
        wanted = [answer for body, answer in zip(decodes(TOKENS), expected, strict=True) if body in bodies]
        harmless = [number for number, answer in enumerate(wanted) if POISON not in answer["ids"]]
        assert len(harmless) > 3

        async def work(http: httpx.AsyncClient) -> None:
            running = Running(http, [bodies[number] for number in harmless])
            await running.decoding(5)
            poison = {"input_ids": [5, 6, POISON, 7], "sampling_params": {"max_new_tokens": 5}}
            told = await http.post("/generate", json=poison)
            assert told.status_code == 500 and "in flight at 2 deaths of the scheduler" in told.text, told.text
            assert await running.answers() == [wanted[number] for number in harmless]

        drive(live, work)


def test_processes_that_die_too_often_end_the_server(tiny_model: Path) -> None:
    """What is in flight is told so, the exit code is not 0, and nobody is left behind."""
    with running_server("--dtype", "float32", "--max-restarts", "1", model=tiny_model) as live:
        family = psutil.Process(live.launcher.pid).children()

        async def work(http: httpx.AsyncClient) -> httpx.Response:
            body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 16000, "ignore_eos": True}}
            call = asyncio.create_task(http.post("/generate", json=body))
            await asyncio.sleep(0.3)
            pid = kill(live, "detokenizer", signal.SIGKILL)
            await another(live, "detokenizer", pid)
            kill(live, "detokenizer", signal.SIGKILL)
            return await call

        answer = drive(live, work)
        assert answer.status_code == 500 and "gives up" in answer.text, answer.text
        assert live.launcher.wait(30) == 1
        assert not [process for process in family if process.is_running()]
        assert "--max-restarts" in live.log()
