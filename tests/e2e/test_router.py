"""Replicas behind the real gateway `sglang-router`: the same answers, one cache a prefix, and nothing lost."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_client import Api
from routers import QUICK, Json, Router, Told, drive, free_port, lasting, running_router
from tiny_models import tiny_bert, tiny_xlm_roberta
from transformers import AutoModelForSequenceClassification

from engine.bench.live_server import LiveServer, running_server

pytest.importorskip("sglang_router")

FLAGS = ("--dtype", "float32", "--max-total-tokens", "40000", "--cpu-threads", "1", "--enable-metrics")
CACHE_AWARE = ("--policy", "cache_aware", *QUICK)


@pytest.fixture(scope="module")
def replicas(tiny_model: Path) -> Iterator[list[LiveServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(running_server(*FLAGS, model=tiny_model)) for _ in range(2)]


@pytest.fixture(scope="module")
def router(replicas: list[LiveServer]) -> Iterator[Router]:
    with running_router(*(replica.url for replica in replicas), flags=CACHE_AWARE) as found:
        yield found


def test_the_router_knows_its_workers(router: Router, replicas: list[LiveServer], tiny_model: Path) -> None:
    workers = {worker["url"]: worker for worker in router.workers()}
    assert workers.keys() == {replica.url for replica in replicas}
    for worker in workers.values():
        assert (worker["model_id"], worker["worker_type"], worker["connection_mode"]) == (
            str(tiny_model), "regular", "HTTP",
        )  # fmt: skip
        assert worker["metadata"].items() >= {
            "model_path": str(tiny_model), "served_model_name": str(tiny_model), "model_type": "llama",
            "architectures": '["LlamaForCausalLM"]', "tp_size": "1", "dp_size": "1", "disaggregation_mode": "null",
        }.items()  # fmt: skip
    http = router.http
    assert http.get("/health").status_code == http.get("/health_generate").status_code == 200
    assert http.get("/readiness").json() == {"status": "ready", "healthy_workers": 2, "total_workers": 2}
    assert http.get("/get_model_info").json() == httpx.get(f"{replicas[0].url}/model_info").json()
    assert http.get("/v1/models").json()["data"][0]["id"] == str(tiny_model)
    # -1 is the router's word for a load that it cannot read.
    assert [worker["load"] for worker in http.get("/get_loads").json()["workers"]] == [0, 0]
    assert http.post("/flush_cache").json()["workers_flushed"] == 2


BODIES: dict[str, Json] = {
    "text": {"text": "hello there", "sampling_params": {"max_new_tokens": 8, "temperature": 0}},
    "sampled": {
        "input_ids": [5, 6, 7],
        "sampling_params": {"max_new_tokens": 8, "sampling_seed": 7, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
    },
    "samples": {"text": "x y", "sampling_params": {"max_new_tokens": 4, "n": 2, "sampling_seed": 3}},
    "batch": {"input_ids": [[5, 6], [7, 8, 9]], "sampling_params": {"max_new_tokens": 3, "temperature": 0}},
    "logprobs": {
        "text": "x y z", "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2,
        "token_ids_logprob": [1, 2], "return_text_in_logprobs": True,
        "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True, "stop_token_ids": [3]},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_answers_are_those_of_a_replica(router: Router, replicas: list[LiveServer], name: str) -> None:
    body = BODIES[name]
    direct, through = Api(replicas[0].url), Api(router.url)
    assert lasting(through.generate(**body)) == lasting(direct.generate(**body))
    assert _ends(through.stream(**body)) == _ends(direct.stream(**body))


def _ends(chunks: list[Json]) -> dict[int, Json]:
    """The last chunk of each item of a stream, which holds all that came before."""
    return {chunk.get("index", 0): lasting(chunk) for chunk in chunks}


def test_a_client_that_leaves_ends_its_request(router: Router, replicas: list[LiveServer]) -> None:
    body = {"text": "x", "sampling_params": {"max_new_tokens": 10_000, "ignore_eos": True}}
    with Api(router.url).open_stream(**body) as chunks:
        assert next(chunks)["meta_info"]["finish_reason"] is None
    for replica in replicas:
        Api(replica.url).wait_idle()


@pytest.mark.parametrize(
    "body",
    [{}, {"text": "x", "sampling_params": {"temperature": -1}}, {"input_ids": [5] * 20000}, {"input_ids": [9999]}],
)
def test_refusals_are_those_of_a_replica(router: Router, replicas: list[LiveServer], body: Json) -> None:
    direct, through = Api(replicas[0].url).post(body), Api(router.url).post(body)
    assert (through.status_code, through.json()) == (direct.status_code, direct.json())
    assert through.status_code == 400


@pytest.mark.parametrize("kind", ["text", "input_ids"])
def test_a_shared_prefix_stays_on_one_replica(router: Router, replicas: list[LiveServer], kind: str) -> None:
    """Of every family of prompts one alone is computed whole, and both replicas have families."""
    urls = [replica.url for replica in replicas]
    router.http.post("/flush_cache").raise_for_status()
    before = [_served(replica) for replica in replicas]

    async def work(http: httpx.AsyncClient) -> list[list[bool]]:
        """Whether the prompts of each turn, one of each family at once, are found in a cache."""
        await _slow(http, urls, 0.03)  # what the router knows nothing of goes where there is less to do
        try:
            return [
                [
                    2 * meta["cached_tokens"] > meta["prompt_tokens"]
                    for meta in await asyncio.gather(
                        *(_meta(http, {kind: _relative(kind, family, turn)}) for family in range(FAMILIES))
                    )
                ]
                for turn in range(5)
            ]
        finally:
            await _slow(http, urls, None)

    assert drive(router.url, work) == [[False] * FAMILIES] + [[True] * FAMILIES] * 4
    counts = [_served(replica) - old for replica, old in zip(replicas, before, strict=True)]
    assert sum(counts) == 5 * FAMILIES and all(counts) and all(count % 5 == 0 for count in counts), counts


FAMILIES = 6


def _relative(kind: str, family: int, turn: int) -> Any:
    """A prompt of this family, that only has its end for itself."""
    return f"{'abcdef'[family] * 120} {turn}" if kind == "text" else [10 + family] * 120 + [20 + turn]


async def _meta(http: httpx.AsyncClient, prompt: Json) -> Json:
    body = {**prompt, "sampling_params": {"max_new_tokens": 2, "temperature": 0}}
    meta: Json = (await http.post("/generate", json=body)).raise_for_status().json()["meta_info"]
    return meta


async def _slow(http: httpx.AsyncClient, urls: list[str], seconds: float | None) -> None:
    """Have the replicas sleep before each step."""
    for url in urls:
        (await http.post(f"{url}/slow_down", json={"forward_sleep_time": seconds})).raise_for_status()


def _served(replica: LiveServer) -> int:
    """Requests that `replica` has answered since its start."""
    text = httpx.get(f"{replica.url}/metrics").text
    (line,) = [line for line in text.splitlines() if line.startswith("sglang:num_requests_total{")]
    return int(float(line.rpartition(" ")[2]))


def test_workers_come_and_go_at_run_time(router: Router, replicas: list[LiveServer]) -> None:
    """By the router's own API."""
    first, second = (replica.url for replica in replicas)
    (gone,) = [worker for worker in router.workers() if worker["url"] == first]
    assert router.http.delete(f"/workers/{gone['id']}").is_success
    router.wait_for(second)
    before = _served(replicas[0])
    assert _some(router, [second], "alone") == 12
    assert _served(replicas[0]) == before
    assert router.http.post("/workers", json={"url": first}).is_success
    router.wait_for(first, second)
    assert _some(router, [first, second], "together") == 12
    assert _served(replicas[0]) > before


def _some(router: Router, urls: list[str], kind: str) -> int:
    """How many of 12 requests at once, each with a prompt of its own, were answered."""

    async def work(http: httpx.AsyncClient) -> int:
        await _slow(http, urls, 0.03)
        answers = await asyncio.gather(*(_meta(http, {"text": f"{number} {kind}"}) for number in range(12)))
        await _slow(http, urls, None)
        return len(answers)

    count: int = drive(router.url, work)
    return count


def test_vectors_through_the_router(tmp_path: Path) -> None:
    """It passes /v1/embeddings on as it is, and /v1/rerank in a shape of its own; /encode and /v1/score it does not."""
    shape: Json = {"num_labels": 1, "max_position_embeddings": 514}
    reranker = tiny_xlm_roberta(tmp_path / "reranker", auto=AutoModelForSequenceClassification, **shape)
    with _one(tiny_bert(tmp_path / "embedder")) as (direct, through):
        body: Json = {"input": ["a b", "c"], "model": "any"}
        found, wanted = (api.post(body, "/v1/embeddings").raise_for_status().json() for api in (through, direct))
        assert found["data"] == wanted["data"] and found["usage"] == wanted["usage"]
        assert [through.post({}, path).status_code for path in ("/encode", "/v1/score")] == [404, 404]
    with _one(reranker) as (direct, through):
        body = {"query": "a b", "documents": ["c", "d e"]}
        wanted = direct.post(body, "/v1/rerank").raise_for_status().json()
        found = through.post(body, "/v1/rerank").raise_for_status().json()["results"]
        assert [(one["index"], one["document"]) for one in found] == [(one["index"], one["document"]) for one in wanted]
        assert [one["score"] for one in found] == pytest.approx([one["score"] for one in wanted], rel=1e-6)


def test_the_router_has_the_key_of_the_replicas(tiny_model: Path) -> None:
    with (
        running_server(*FLAGS, "--api-key", "a-key", model=tiny_model) as replica,
        running_router(replica.url, flags=QUICK, key="a-key") as router,
    ):
        api = Api(router.url, Authorization="Bearer a-key")
        assert api.generate(text="x", sampling_params={"max_new_tokens": 1})["meta_info"]["completion_tokens"] == 1
        assert Api(router.url).post({"text": "x"}).status_code == 401


@contextmanager
def _one(model: Path) -> Iterator[tuple[Api, Api]]:
    """A client of a replica, and one of the router in front of it."""
    flags = ("--dtype", "float32", "--cpu-threads", "1", "--skip-server-warmup")
    with running_server(*flags, model=model) as replica, running_router(replica.url, flags=QUICK) as router:
        yield Api(replica.url), Api(router.url)


BROKEN_OFF = {"RemoteProtocolError", "ReadError", "CutOffError"}
"""What befalls who is being answered by a replica that dies."""


@pytest.mark.slow
def test_a_replica_is_killed_under_load_and_comes_back(tiny_model: Path) -> None:
    """Who asks again what broke off gets every answer that an undisturbed replica gives."""
    ports = free_port(), free_port()
    urls = [f"http://127.0.0.1:{port}" for port in ports]

    def start(number: int) -> AbstractContextManager[LiveServer]:
        return running_server(*FLAGS, "--port", str(ports[number]), model=tiny_model)

    with ExitStack() as stack:
        replicas = [stack.enter_context(start(number)) for number in range(2)]
        expected = {kind: _ask_all(urls[0], kind, Told([])) for kind in ("first", "second", "third")}
        router = stack.enter_context(running_router(*urls, flags=CACHE_AWARE))

        def kill() -> None:
            replicas[1].launcher.kill()
            replicas[1].launcher.wait()

        told = Told([])
        assert _under_load(router, urls, "first", told, kill) == expected["first"]
        # The router itself asks the other replica for what has no answer yet: only streams break off.
        assert set(told.refusals) <= BROKEN_OFF and told.refusals
        router.wait_for(urls[0])
        told = Told([])
        assert _ask_all(router.url, "second", told) == expected["second"]
        assert told.refusals == []
        replicas[1] = stack.enter_context(start(1))
        router.wait_for(*urls)
        assert _under_load(router, urls, "third", told, lambda: None) == expected["third"]
        assert told.refusals == [] and _served(replicas[1]) > 0


@pytest.mark.slow
def test_a_replica_that_drains_loses_nothing(tiny_model: Path) -> None:
    """Streams that it has begun come to their ends, and what it refuses the router takes to the other."""
    flags = (*FLAGS, "--drain-timeout", "60")
    with ExitStack() as stack:
        replicas = [stack.enter_context(running_server(*flags, model=tiny_model)) for _ in range(2)]
        urls = [replica.url for replica in replicas]
        expected = {kind: _ask_all(urls[0], kind, Told([])) for kind in ("first", "second")}
        router = stack.enter_context(running_router(*urls, flags=CACHE_AWARE))
        told = Told([])
        drained = replicas[1].launcher
        assert _under_load(router, urls, "first", told, drained.terminate) == expected["first"]
        assert _ask_all(router.url, "second", told) == expected["second"]
        assert told.refusals == []
        assert drained.wait(60) == 0
        router.wait_for(urls[0])


def _load(kind: str) -> list[Json]:
    """Calls, every other one for a stream, whose prompts no cache knows that knows those of other kinds."""
    return [
        {
            "text": f"{kind} {number} {chr(97 + number % 26) * (3 + number)}",
            "stream": number % 2 == 0,
            "sampling_params": {"max_new_tokens": 60, "ignore_eos": True, "sampling_seed": number},
        }
        for number in range(24)
    ]


def _ask_all(url: str, kind: str, told: Told) -> list[Json]:
    async def work(http: httpx.AsyncClient) -> list[Json]:
        return list(await asyncio.gather(*(told.ask(http, body) for body in _load(kind))))

    found: list[Json] = drive(url, work)
    return found


def _under_load(router: Router, urls: list[str], kind: str, told: Told, disturb: Callable[[], Any]) -> list[Json]:
    """The answers to the load of this kind, `disturb` being called once both replicas compute."""

    async def work(http: httpx.AsyncClient) -> list[Json]:
        await _slow(http, urls, 0.03)
        running = [asyncio.create_task(told.ask(http, body)) for body in _load(kind)]
        await _both_compute(http, urls)
        await asyncio.to_thread(disturb)
        answers = list(await asyncio.gather(*running))
        await _slow(http, urls[:1], None)
        return answers

    answers: list[Json] = drive(router.url, work)
    print("what clients were told:", Counter(told.refusals))
    return answers


async def _both_compute(http: httpx.AsyncClient, urls: list[str]) -> None:
    deadline = time.monotonic() + 30
    while True:
        loads = [(await http.get(f"{url}/get_load")).json()[0]["num_reqs"] for url in urls]
        if min(loads) >= 4:
            return
        assert time.monotonic() < deadline, loads
        await asyncio.sleep(0.05)
