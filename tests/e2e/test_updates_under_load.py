"""Ten updates under 32 streaming clients, and a pause: nobody fails, nobody sees two versions, nothing leaks."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import httpx
import psutil
from live_client import greedy
from oracle import check_greedy
from tiny_models import load_oracle, tiny_llama, upside_down

from engine.bench.live_server import LiveServer, running_server

CLIENTS = 32
UPDATES = 10
TOKENS = 24
MEMORY_SLACK = 16 << 20
"""Bytes that the scheduler may grow from the second update to the last: allocator noise, far below ten checkpoints."""

Json = dict[str, Any]


class Clients:
    """Streams that follow one another until `stop`. answers: (number of the prompt, the last chunk)."""

    def __init__(self, http: httpx.AsyncClient, prompts: list[list[int]], tokens: int) -> None:
        self.answers: list[tuple[int, Json]] = []
        self.stop = asyncio.Event()
        self._news = asyncio.Event()
        self._http = http
        self._prompts = prompts
        self._tokens = tokens
        self._tasks = [asyncio.create_task(self._run(number)) for number in range(CLIENTS)]

    async def finish(self) -> list[tuple[int, Json]]:
        self.stop.set()
        await asyncio.gather(*self._tasks)
        return self.answers

    async def answered(self, more: int) -> None:
        """Wait until so many more answers have come."""
        wanted = len(self.answers) + more
        while len(self.answers) < wanted:
            self._news.clear()
            await self._news.wait()

    async def _run(self, number: int) -> None:
        while not self.stop.is_set():
            number = (number + 1) % len(self._prompts)
            body = {"input_ids": self._prompts[number], "stream": True, "sampling_params": greedy(self._tokens)}
            last: Json = {}
            async with self._http.stream("POST", "/generate", json=body) as answer:
                assert answer.status_code == 200
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        chunk = json.loads(line.removeprefix("data: "))
                        before = last.get("meta_info", chunk["meta_info"])["weight_version"]
                        assert self._tokens > TOKENS or before == chunk["meta_info"]["weight_version"]
                        last = chunk
            self.answers.append((number, last))
            self._news.set()


async def _drive(server: LiveServer, checkpoints: list[Path], prompts: list[list[int]]) -> tuple[Any, Any]:
    limits = httpx.Limits(max_connections=CLIENTS * 2, keepalive_expiry=1)
    scheduler = psutil.Process(server.pids["scheduler tp0"])
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits, trust_env=False) as http:

        async def post(path: str, **body: Any) -> Json:
            answer = await http.post(path, json=body)
            assert answer.status_code == 200, answer.text
            told: Json = answer.json()
            return told

        async def running() -> int:
            told = (await http.get("/server_info")).json()
            return int(told["internal_states"][0]["num_running_reqs"])

        clients = Clients(http, prompts, TOKENS)
        memory = []
        for number in range(UPDATES):
            path = str(checkpoints[(number + 1) % 2])
            told = await post("/update_weights_from_disk", model_path=path, weight_version=path)
            assert told["message"] == f"Succeeded to update model weights. Weight version updated to {path}."
            memory.append(scheduler.memory_info().rss)
            await clients.answered(CLIENTS)
        answers = await clients.finish()

        # What a trainer does: long requests go on behind the pause, with the new weights, and none of them fails.
        clients = Clients(http, prompts, 200)
        for mode in ("retract", "in_place"):
            await asyncio.sleep(0.2)
            await post("/pause_generation", mode=mode)
            while mode == "in_place" and not await running():  # they all ended at that very moment
                await post("/continue_generation")
                await asyncio.sleep(0.05)
                await post("/pause_generation", mode=mode)
            assert (await http.get("/ready")).status_code == 503
            assert (await http.get("/health")).status_code == 200
            told = await post("/update_weights", model_path=str(checkpoints[1]))
            assert told["message"].startswith(
                "Succeeded to update model weights." if mode == "retract" else "Weights were updated, but the cache"
            )
            await post("/continue_generation")
        paused = await clients.finish()
    assert memory[-1] - memory[1] < MEMORY_SLACK, [size >> 10 for size in memory]
    return answers, paused


def _check_cache_and_refusal(http: httpx.Client, prompt: list[int], path: str) -> None:
    """A failed update changes nothing, not even the cache; one that succeeds leaves no cached prefix."""
    ask = {"input_ids": prompt, "sampling_params": greedy(1)}
    http.post("/generate", json=ask)
    wrong = "qwen/qwen2.5-0.5b-instruct-wrong"
    before = http.get("/model_info").json()
    failed = http.post("/update_weights", json={"model_path": wrong, "weight_version": "never"})
    message = f"Failed to get weights iterator: {wrong} (repository not found)."
    assert failed.status_code == 400
    assert failed.json() == {"success": False, "message": message, "num_paused_requests": 0}
    assert http.get("/model_info").json() == before
    assert http.post("/generate", json=ask).json()["meta_info"]["cached_tokens"] == len(prompt) - 1
    assert http.post("/update_weights", json={"model_path": path}).json()["success"]
    assert http.post("/generate", json=ask).json()["meta_info"]["cached_tokens"] == 0


def test_updates_under_load(tmp_path: Path) -> None:
    first = tiny_llama(tmp_path / "first")
    checkpoints = [first, upside_down(first, tmp_path / "second")]
    source = random.Random(5)
    shared = [source.randrange(3, 400) for _ in range(40)]
    prompts = [shared[: 10 * (number % 5)] + [source.randrange(3, 400) for _ in range(15)] for number in range(8)]
    flags = ("--dtype", "float32", "--weight-version", str(first), "--log-level", "warning")
    with running_server(*flags, model=first, env={"TOKENMILL_STRICT": "1", "HF_HUB_OFFLINE": "1"}) as server:
        answers, paused = asyncio.run(_drive(server, checkpoints, prompts))
        with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as http:
            state = http.get("/server_info").json()["internal_states"][0]
            assert state["num_running_reqs"] == state["num_waiting_reqs"] == state["num_used_tokens"] == 0
            assert http.get("/v1/models").json()["data"][0]["id"] == str(checkpoints[1])
            _check_cache_and_refusal(http, prompts[4], str(first))
    assert all(last["meta_info"]["finish_reason"]["type"] == "length" for _, last in answers + paused)
    assert all(len(last["output_ids"]) == 200 for _, last in paused)
    # Every answer of a version to a prompt is the same, and it is what transformers says of that checkpoint.
    found: dict[tuple[str, int], list[int]] = {}
    for number, last in answers:
        version = last["meta_info"]["weight_version"]
        assert found.setdefault((version, number), last["output_ids"]) == last["output_ids"]
    oracles = {str(path): load_oracle(path) for path in checkpoints}
    assert {version for version, _ in found} == set(oracles)
    for (version, number), output in found.items():
        check_greedy(oracles[version], prompts[number], output, None)
    assert any(found[str(checkpoints[0]), number] != output for (_, number), output in found.items())
