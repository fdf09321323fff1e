"""What flags and environment variables change, each server a tiny random model (contract §1.2, §2.5, §5.3, §9)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_client import Api, Json, check_growth, greedy
from tiny_models import tiny_llama

from engine.bench.live_server import running_server

C = 1024
LONG = greedy(15_000)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("short") / "model")


@contextmanager
def serving(model: Path, *flags: str, key: str = "None", env: Json | None = None) -> Iterator[Api]:
    strict = {"TOKENMILL_STRICT": "1", **(env or {})}
    with running_server("--dtype", "float32", *flags, model=model, env=strict) as server:
        api = Api(server.url, **bearer(key))
        yield api
        api.wait_idle()


def refused(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["message"]


def overloaded(message: str) -> tuple[int, Json]:
    """The status and body of shape D for a call that is refused for load."""
    return 503, {"object": "error", "message": message, "type": "503", "param": None, "code": 503}


def told(answer: httpx.Response) -> tuple[int, Json]:
    if answer.status_code == 503:
        assert answer.headers["retry-after"] == "1"
    return answer.status_code, answer.json()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_without_tokenizer_and_with_keys(model: Path) -> None:
    flags = ("--skip-tokenizer-init", "--api-key", "user", "--admin-api-key", "root", "--grammar-backend", "none")
    with serving(model, *flags, key="user") as api:
        assert all(api.http.get("/server_info").json()[name] is None for name in ("api_key", "admin_api_key"))
        _check_keys(api)
        answer = api.generate(input_ids=[5, 6, 7], return_logprob=True, logprob_start_len=0, sampling_params=greedy(4))
        assert "text" not in answer and len(answer["output_ids"]) == 4
        assert all("text" not in chunk for chunk in api.stream(input_ids=[5, 6, 7], sampling_params=greedy(4)))
        needs = "is unavailable when skip_tokenizer_init=True (requires tokenizer to"
        for body, message in (
            ({"text": "a"}, "The engine initialized with skip_tokenizer_init=True cannot accept text prompts. Please "
             "provide input_ids or re-initialize the engine with skip_tokenizer_init=False."),
            ({"input_ids": [5], "sampling_params": {"stop": ["a"]}},
             f"stop=['a'] {needs} decode tokens to text for matching)."),
            ({"input_ids": [5], "sampling_params": {"stop_regex": "a"}}, "stop_regex=['a'] is unavailable"),
            ({"input_ids": [5], "sampling_params": {"min_new_tokens": 1}}, "min_new_tokens=1 is unavailable"),
            ({"input_ids": [5], "sampling_params": {"regex": "a"}},
             "Grammar-based generation (json_schema, regex, ebnf, structural_tag) is not supported when the server is "
             "launched with --grammar-backend none"),
        ):  # fmt: skip
            status, found = refused(api.post(body))
            assert status == 400 and found.startswith(message)
        stop = api.generate(input_ids=[5], sampling_params={"stop_token_ids": [9], "logit_bias": {"9": 100}})
        assert (stop["output_ids"], stop["meta_info"]["finish_reason"]) == ([9], {"type": "stop", "matched": 9})
        for path in ("/tokenize", "/detokenize"):
            failed = api.post({"prompt": "a", "tokens": [5]}, path)
            assert (failed.status_code, failed.json()["type"]) == (500, "InternalServerError")


def _check_keys(api: Api) -> None:
    body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 1}}
    for path, right, wrong in (("/generate", "user", "root"), ("/flush_cache", "root", "user")):
        for headers in (bearer(wrong), bearer("None"), {"Authorization": right}, {"Authorization": ""}):
            answer = api.http.post(path, json=body, headers=headers)
            assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})
        assert api.http.post(path, json=body, headers={"Authorization": f"bEARER {right}"}).status_code == 200
    assert httpx.get(f"{api.url}/model_info").status_code == 401
    assert httpx.get(f"{api.url}/v1/models").status_code == 401
    for path in ("/health", "/health_generate", "/ready"):
        assert httpx.get(f"{api.url}{path}").status_code == 200
    assert httpx.get(f"{api.url}/ping").status_code == 401
    assert httpx.options(f"{api.url}/generate").status_code != 401


def test_truncation_preferences_and_no_cache(model: Path) -> None:
    preferred = {"temperature": 0, "max_new_tokens": 7, "ignore_eos": True, "stop": "\0"}
    flags = ("--allow-auto-truncate", "--disable-radix-cache", "--stream-interval", "4")
    with serving(model, *flags, "--preferred-sampling-params", json.dumps(preferred)) as api:
        assert api.http.get("/get_model_info").json()["preferred_sampling_params"] == preferred
        assert api.http.get("/server_info").json()["disable_radix_cache"] is True
        for _ in range(2):
            answer = api.generate(input_ids=list(range(100)))
            assert (answer["meta_info"]["cached_tokens"], len(answer["output_ids"])) == (0, 7)
        merged = api.generate(input_ids=list(range(100)), sampling_params={"max_new_tokens": 3})
        assert merged["output_ids"] == answer["output_ids"][:3]
        null = api.generate(input_ids=list(range(100)), sampling_params={"max_new_tokens": None})
        assert null["meta_info"]["completion_tokens"] == C - 1 - 100 - 1
        samples = api.generate(input_ids=list(range(100)), sampling_params={"n": 2})
        assert [sample["output_ids"] for sample in samples] == [answer["output_ids"]] * 2
        for count in (C - 6, C, 3 * C):
            cut = api.generate(input_ids=[5] * count, return_prompt_token_ids=True)
            assert cut["meta_info"]["prompt_tokens"] == len(cut["prompt_token_ids"]) <= C - 7
        shorter = api.generate(input_ids=[5] * 1000, sampling_params={"max_new_tokens": 500})
        assert 1000 + shorter["meta_info"]["completion_tokens"] <= C
        assert shorter["meta_info"]["completion_tokens"] >= C - 1000 - 2
        for params, interval in ({}, 4), ({"stream_interval": 9}, 9), ({"stream_interval": 0}, 1):
            chunks = api.stream(text="a", sampling_params={**params, "max_new_tokens": 21})
            counts = [chunk["meta_info"]["completion_tokens"] for chunk in chunks]
            assert counts[-1] == 21
            assert all(b - a >= interval for a, b in itertools.pairwise(counts[:-1]))


@contextmanager
def occupied(api: Api, **more: Any) -> Iterator[None]:
    """A request that runs for the whole block, on a server that runs one at a time."""
    # Slowed down, since the tiny model makes all its tokens in the time that a busy machine takes for a few calls.
    assert api.post({"forward_sleep_time": 0.01}, "/slow_down").status_code == 200
    with api.open_stream(text="first", sampling_params=LONG, **more) as chunks:
        next(chunks)
        yield
    assert api.post({"forward_sleep_time": None}, "/slow_down").status_code == 200


def queue(pool: ThreadPoolExecutor, api: Api, bodies: list[Json]) -> list[Future[httpx.Response]]:
    """Send `bodies` one behind the other, so that they wait in this order."""
    calls = []
    for number, body in enumerate(bodies, 1):
        calls.append(pool.submit(api.post, {"sampling_params": greedy(1), **body}))
        api.wait_until(num_waiting_reqs=number)
    return calls


def test_a_full_queue_and_priorities(tiny_model: Path) -> None:
    flags = ("--max-running-requests", "1", "--max-queued-requests", "2", "--enable-priority-scheduling")
    full, outranked = "The request queue is full.", "The request is aborted by a higher priority request."
    with serving(tiny_model, *flags) as api, ThreadPoolExecutor(4) as pool:
        with occupied(api):
            low, middle = queue(pool, api, [{"text": "low", "priority": 1}, {"text": "middle", "priority": 2}])
            assert told(api.post({"text": "a", "priority": 1})) == overloaded(full)
            (chunk,) = api.stream(text="a", priority=0)
            assert chunk["text"] == ""
            assert chunk["meta_info"]["finish_reason"] == {
                "type": "abort", "message": full, "status_code": 503, "err_type": None,
            }  # fmt: skip
            high = pool.submit(api.post, {"text": "high", "priority": 9, "sampling_params": greedy(1)})
            assert told(low.result()) == overloaded(outranked)
            api.post({"abort_all": True}, "/abort_request")
        for call in (middle, high):
            answer = call.result()
            assert answer.status_code == 200
            finish = answer.json()["meta_info"]["finish_reason"]
            assert finish["type"] in ("abort", "length")


def test_aborts_in_the_queue_and_longest_prefix_first(tiny_model: Path) -> None:
    flags = ("--max-running-requests", "1", "--schedule-policy", "lpm", "--abort-on-priority-when-disabled")
    message = "Using priority is disabled for this server. Please send a new request without a priority."
    with serving(tiny_model, *flags) as api, ThreadPoolExecutor(4) as pool:
        status, body = told(api.post({"text": "a", "priority": 1}))
        assert (status, body["message"], body["code"]) == (503, message, 503)
        (chunk,) = api.stream(text="a", priority=1)
        assert chunk["meta_info"]["finish_reason"]["status_code"] == 503
        with occupied(api):
            waiting = queue(pool, api, [{"text": "w", "rid": "x"}, {"text": ["v"], "rid": "x"}])
            api.post({"rid": "x"}, "/abort_request")
            for answer in (waiting[0].result().json(), waiting[1].result().json()[0]):
                assert (answer["text"], answer["output_ids"]) == ("", [])
                meta = answer["meta_info"]
                assert meta["finish_reason"]["type"] == "abort"
                assert meta["finish_reason"]["message"] == "Abort in waiting queue"
                assert (meta["completion_tokens"], meta["weight_version"]) == (0, "default")
        api.wait_idle()
        shared = list(range(50, 150))
        api.generate(input_ids=shared, sampling_params=greedy(1))
        with occupied(api, rid="first"):
            cold, warm = queue(pool, api, [{"input_ids": [7] * 100}, {"input_ids": [*shared, 3]}])
            api.post({"rid": "first"}, "/abort_request")
        stamps = [call.result().json()["meta_info"]["response_sent_to_client_ts"] for call in (cold, warm)]
        assert stamps[1] < stamps[0]


def test_timeouts(tiny_model: Path) -> None:
    endless = {"text": "first", "sampling_params": greedy(15_000)}
    limits = {"SGLANG_REQ_WAITING_TIMEOUT": "0.2", "SGLANG_REQ_RUNNING_TIMEOUT": "1"}
    with serving(tiny_model, "--max-running-requests", "1", env=limits) as api, ThreadPoolExecutor(2) as pool:
        running = pool.submit(api.post, endless)
        api.wait_until(num_running_reqs=1)
        waiting = pool.submit(api.post, {"text": "second"})
        assert told(waiting.result()) == overloaded("Request waiting timeout reached.")
        assert told(running.result()) == overloaded("Request running timeout reached.")
        last = check_growth(api.stream(**endless))
        assert last["meta_info"]["finish_reason"] == {
            "type": "abort", "message": "Request running timeout reached.", "status_code": 503, "err_type": None,
        }  # fmt: skip
        assert 0 < len(last["output_ids"]) < 15_000


def test_a_small_pool_and_limits_of_the_environment(model: Path) -> None:
    env = {"SGLANG_MAX_NEW_TOKENS_LIMIT": "70", "SGLANG_RETURN_ORIGINAL_LOGPROB": "1"}
    with serving(model, "--max-total-tokens", "200", "--context-length", "600", env=env) as api:
        assert api.http.get("/server_info").json()["max_req_input_len"] == 194
        status, message = refused(api.post({"input_ids": [5] * 194}))
        assert (status, message) == (
            400,
            "Input length (194 tokens) exceeds the maximum allowed length (194 tokens). Use a shorter input or enable "
            "--allow-auto-truncate.",
        )
        answer = api.generate(input_ids=[5] * 193, sampling_params=greedy(300, min_new_tokens=300))
        assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 199 - 193 - 1}
        with ThreadPoolExecutor(6) as pool:
            calls = [pool.submit(api.generate, input_ids=[i] * 60, sampling_params=greedy(60)) for i in range(6)]
            assert all(len(call.result()["output_ids"]) == 60 for call in calls)
        limited = api.generate(input_ids=[5], sampling_params=greedy(150, min_new_tokens=100))
        assert limited["meta_info"]["finish_reason"] == {"type": "length", "length": 70}
        cold = api.generate(
            input_ids=[5, 6], return_logprob=True, sampling_params={"temperature": 0.4, "max_new_tokens": 6}
        )
        scored = api.generate(
            input_ids=[5, 6, *cold["output_ids"]], return_logprob=True, logprob_start_len=1,
            sampling_params={"max_new_tokens": 0},
        )  # fmt: skip
        before_temperature = [entry[0] for entry in scored["meta_info"]["input_token_logprobs"][1:]]
        told_first = [entry[0] for entry in cold["meta_info"]["output_token_logprobs"]]
        assert told_first == pytest.approx(before_temperature, abs=1e-3)
