"""Any process may die at any moment: requests go on where they stood, and come to what they would have come to."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from kills import (
    STREAMS,
    Json,
    Running,
    Target,
    Way,
    decodes,
    drive,
    in_loops,
    log_since,
    pid_of,
    prefills,
    undisturbed,
    whole,
)
from poisoned_scheduler import POISON

from engine.bench.live_server import LiveServer, running_server

TOKENS = 250
SLOW = 0.02
"""Seconds before each step, until a process has ended."""
ORPHANS = 10_000
"""Tokens of a stream whose frontend dies: more than there is time for."""
WAYS: tuple[Way, ...] = (signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV, "exception")
HOW: dict[Way, str] = {
    signal.SIGKILL: "was killed by SIGKILL", signal.SIGSTOP: "hung and was killed",
    signal.SIGSEGV: "was killed by SIGSEGV", "exception": "exited with code 1",
}  # fmt: skip
MOMENTS = ("idle", "prefill", "decode", "update", "twice")
PROCESSES = ("tokenizer", "scheduler", "detokenizer")
FLAGS = ("--dtype", "float32", "--max-total-tokens", "60000", "--incremental-streaming-output")
PAUSE_LIMIT = 100.0
"""Seconds: generous, for a machine that does other things as well."""
UNMARKED = {
    ("idle", "tokenizer", "exception"),
    ("decode", "scheduler", signal.SIGKILL),
    ("decode", "detokenizer", "exception"),
    ("decode", "tokenizer", signal.SIGSTOP),
    ("update", "scheduler", "exception"),
    ("twice", "scheduler", signal.SIGSEGV),
    ("decode", "frontend", signal.SIGKILL),
    ("decode", "frontend", "exception"),
}


@dataclass(frozen=True)
class Shared:
    """The server of the matrix. folders: two with the same weights, the one that serves last. thrown: see `Target`."""

    live: LiveServer
    folders: list[str]
    thrown: Path


@pytest.fixture(scope="module")
def shared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """A server that survives any number of deaths."""
    same = tmp_path_factory.mktemp("same") / "model"
    shutil.copytree(tiny_model, same)
    thrown = tmp_path_factory.mktemp("thrown")
    flags = ("--watchdog-timeout", "2", "--max-restarts", "100000", *FLAGS)
    environment = {"TOKENMILL_STRICT": "1", "HF_HUB_OFFLINE": "1", "TOKENMILL_FAULTS": in_loops(thrown)}
    with running_server(*flags, model=tiny_model, env=environment) as live:
        yield Shared(live, [str(same), str(tiny_model)], thrown)


@pytest.fixture(scope="module")
def expected(shared: Shared) -> list[Json]:
    return aim(shared, lambda target: undisturbed(target.http, decodes(TOKENS)))


def aim(shared: Shared, work: Callable[[Target], Awaitable[Any]]) -> Any:
    return drive(shared.live, lambda http: work(Target(shared.live, http, shared.thrown)))


def cells(*processes: str) -> Iterator[Any]:
    for moment in MOMENTS:
        for process in processes:
            for way in WAYS:
                marks = () if (moment, process, way) in UNMARKED else (pytest.mark.slow,)
                yield pytest.param(moment, process, way, id=f"{moment}-{process}-{_name(way)}", marks=marks)


def _name(way: Way) -> str:
    return way if isinstance(way, str) else way.name


@pytest.mark.parametrize(("moment", "process", "way"), list(cells(*PROCESSES)))
def test_nothing_is_lost(shared: Shared, expected: list[Json], moment: str, process: str, way: Way) -> None:
    log_size = shared.live.log_path.stat().st_size
    pids: list[int] = []

    async def work(target: Target) -> float:
        if moment == "prefill":
            return await _ended_in_prefill(target, process, way, pids)
        if moment == "idle":
            pids.append(await target.end(process, way))
        else:
            await target.slow(SLOW)
        running = Running(target.http, decodes(TOKENS))
        update = None
        if moment != "idle":
            await running.decoding(5)
            if moment == "update":
                update = await _begin_update(target, shared.folders[0], log_size)
            if moment == "twice":
                pids.append(await target.end(process, way))
                await _when_to_end_again(target, running, process, way, pids[0], log_size)
            pids.append(await target.end_for_good(process, way))
            await target.slow(None)
        answers = await running.answers()
        for index, (found, wanted) in enumerate(zip(answers, expected, strict=True)):
            assert found == wanted, index
        if update is not None:
            told = (await update).json()
            assert told["success"], told
            shared.folders.reverse()
            assert (await target.http.get("/model_info")).json()["model_path"] == shared.folders[1]
        return running.pause

    pause = aim(shared, work)
    log = log_since(shared.live, log_size)
    replays = [int(count) for count in re.findall(r"whole again: (\d+) requests", log)]
    print(f"pause of {moment}, {process}, {_name(way)}: {pause:.2f} s; replayed {replays}")
    # Without the tokenizer those that run may come to their end before the replay, and so may those in their prefill.
    if moment not in ("idle", "prefill") and process != "tokenizer":
        assert max(replays) >= 3
    assert pause < PAUSE_LIMIT
    _check_clean(shared)
    _check_told(shared, log_size, process, way, pids)


async def _when_to_end_again(target: Target, running: Running, process: str, way: Way, pid: int, log_size: int) -> None:
    """Wait for the moment of the second end: as soon as the next process is there (for an exception, in the first turn
    of its loop); when streams have just gone on, perhaps in the midst of a trial; or when all trials are over. A death
    by anything but SIGKILL in a trial is blamed on the request that is on trial."""
    await target.another(process, pid)
    if way in (signal.SIGKILL, signal.SIGSEGV):
        await target.logged("whole again", log_size)
        await running.progress(*((1, 1) if way == signal.SIGKILL else (STREAMS, 3)))


async def _begin_update(target: Target, folder: str, log_size: int) -> asyncio.Task[httpx.Response]:
    """Returns when the scheduler has begun with it; requests that run are to end first."""
    update = asyncio.create_task(target.http.post("/update_weights", json={"model_path": folder}))
    await target.logged(f"are to be updated to those of {folder}", log_size)
    return update


async def _ended_in_prefill(target: Target, process: str, way: Way, pids: list[int]) -> float:
    """Returns by how much longer than otherwise the first token took."""
    bodies = prefills(8)
    await target.slow(5 * SLOW)
    running = Running(target.http, bodies)
    await target.has_requests(1)
    pids.append(await target.end_for_good(process, way))
    await target.slow(None)
    answers = await running.answers()
    await target.http.post("/flush_cache?timeout=20")
    plain = Running(target.http, bodies)
    assert answers == await plain.answers()
    return running.pause - plain.pause


def _check_clean(shared: Shared) -> None:
    """Nothing is left behind in the scheduler (whose strict checks have held all along)."""

    async def work(target: Target) -> None:
        deadline = time.monotonic() + 20
        while True:
            state = (await target.http.get("/server_info")).json()["internal_states"][0]
            if not (state["num_running_reqs"] or state["num_waiting_reqs"] or state["num_used_tokens"]):
                return
            assert time.monotonic() < deadline, state
            await asyncio.sleep(0.05)

    aim(shared, work)


def _check_told(shared: Shared, log_size: int, process: str, way: Way, pids: list[int]) -> None:
    """Each end is in the log; an exception with its traceback, and an exit code that is not 0."""
    log = log_since(shared.live, log_size)
    for pid in pids:
        assert re.search(rf"error: {process}.* \(pid {pid}\) {HOW[way]}", log), log
    if way == "exception":
        assert log.count("InjectedFaultError: nobody caught it") >= len(pids)
        assert "Traceback (most recent call last)" in log
        assert "graceful shutdown" not in log  # a broken frontend does not wait for its connections


@pytest.mark.parametrize(("moment", "process", "way"), list(cells("frontend")))
def test_a_frontend_that_dies_takes_its_connections_and_nothing_else(
    shared: Shared, expected: list[Json], moment: str, process: str, way: Way
) -> None:
    """New connections are served within seconds, and no orphan goes on computing."""
    log_size = shared.live.log_path.stat().st_size
    bodies = prefills(ORPHANS) if moment == "prefill" else decodes(ORPHANS)
    others = {other: pid_of(shared.live, other) for other in PROCESSES}
    pids: list[int] = []

    async def work(target: Target) -> float:
        running = None if moment == "idle" else Running(target.http, bodies)
        update = None
        if moment == "prefill":
            await target.has_requests(1)
        elif running is not None:
            await running.decoding(5)
        if moment == "update":
            update = await _begin_update(target, shared.folders[0], log_size)
        pids.append(await target.end(process, way))
        began = time.monotonic()
        if moment == "twice":
            await target.another(process, pids[0])
            pids.append(await target.end(process, way))
        for connection in filter(None, (running and running.answers(), update)):
            with pytest.raises(httpx.TransportError):
                await connection
        await target.another(process, pids[-1])
        await whole(target.http)
        return time.monotonic() - began

    pause = aim(shared, work)
    print(f"pause of {moment}, {process}, {_name(way)}: {pause:.2f} s")
    assert pause < PAUSE_LIMIT
    _check_clean(shared)
    _check_told(shared, log_size, process, way, pids)
    assert {other: pid_of(shared.live, other) for other in PROCESSES} == others
    if moment == "update":  # it goes on without whoever has asked for it
        aim(shared, lambda target: _until_served(target, shared.folders[0]))
        shared.folders.reverse()
    assert aim(shared, lambda target: undisturbed(target.http, decodes(TOKENS))) == expected


async def _until_served(target: Target, folder: str) -> None:
    deadline = time.monotonic() + 60
    while (found := (await target.http.get("/model_info")).json()["model_path"]) != folder:
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.05)


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

        async def work(target: Target) -> None:
            http = target.http
            running = Running(http, [bodies[number] for number in harmless])
            await running.decoding(5)
            poison = {"input_ids": [5, 6, POISON, 7], "sampling_params": {"max_new_tokens": 5}}
            told = await http.post("/generate", json=poison)
            assert told.status_code == 500 and "in flight at 2 deaths of the scheduler" in told.text, told.text
            assert await running.answers() == [wanted[number] for number in harmless]

        aim(Shared(live, [], here), work)


def test_a_drain_waits_for_a_process_that_is_replaced(tiny_model: Path, expected: list[Json], tmp_path: Path) -> None:
    """SIGTERM comes while there is no scheduler: what is in flight ends as ever, and so does the server."""
    with running_server("--drain-timeout", "100", *FLAGS, model=tiny_model, env={"TOKENMILL_STRICT": "1"}) as live:

        async def work(target: Target) -> list[Json]:
            await target.slow(SLOW)
            running = Running(target.http, decodes(TOKENS))
            await running.decoding(5)
            pid = await target.end("scheduler", signal.SIGKILL)
            await target.another("scheduler", pid)
            live.launcher.terminate()
            return await running.answers()

        assert aim(Shared(live, [], tmp_path), work) == expected
        assert live.launcher.wait(60) == 0
        assert "draining: 32 requests in flight" in live.log(), live.log()


def test_processes_that_die_too_often_end_the_server(tiny_model: Path, tmp_path: Path) -> None:
    """What is in flight is told so, the exit code is not 0, and nobody is left behind."""
    with running_server("--dtype", "float32", "--max-restarts", "1", model=tiny_model) as live:
        family = psutil.Process(live.launcher.pid).children()

        async def work(target: Target) -> httpx.Response:
            body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 16000, "ignore_eos": True}}
            call = asyncio.create_task(target.http.post("/generate", json=body))
            await target.has_requests(1)
            pid = await target.end("detokenizer", signal.SIGKILL)
            await target.another("detokenizer", pid)
            await target.end("detokenizer", signal.SIGKILL)
            return await call

        answer = aim(Shared(live, [], tmp_path), work)
        assert answer.status_code == 500 and "gives up" in answer.text, answer.text
        assert live.launcher.wait(30) == 1
        assert not [process for process in family if process.is_running()]
        assert "--max-restarts" in live.log()
