"""What real clients check of the other routes (contract §3, §4.1, §4.8, §10), mostly on the default model."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from live_client import Api, greedy

MODEL = "SmolLM2-135M-Instruct"
FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)
LONG = greedy(15_000)


# The seed's examples, in their order ---------------------------------------------------------------------------------


def test_seed_wait_for_server(default_api: Api) -> None:
    answer = default_api.http.get("/v1/models", headers={"Authorization": "Bearer None"})
    assert answer.status_code == 200


def test_seed_generate(default_api: Api) -> None:
    response = default_api.http.post("/generate", json={"text": "What is the capital of France?"})
    assert response.status_code == 200
    assert isinstance(response.json()["text"], str)
    assert 1 <= response.json()["meta_info"]["completion_tokens"] <= 128


def test_seed_model_info(default_api: Api) -> None:
    response_json = default_api.http.get("/get_model_info").json()
    assert response_json["model_path"] == response_json["tokenizer_path"]
    assert Path(response_json["model_path"]).is_file()
    assert response_json["is_generation"] is True
    assert response_json["preferred_sampling_params"] is None
    assert response_json.keys() == {
        "model_path",
        "is_generation",
        "tokenizer_path",
        "preferred_sampling_params",
        "weight_version",
        "has_image_understanding",
        "has_audio_understanding",
        "model_type",
        "architectures",
    }
    assert default_api.http.get("/model_info").json() == response_json
    assert (response_json["model_type"], response_json["architectures"]) == ("llama", ["LlamaForCausalLM"])


def test_model_path_as_it_was_given(tiny_api: Api, tiny_model: Path) -> None:
    info = tiny_api.http.get("/get_model_info").json()
    assert info["model_path"] == info["tokenizer_path"] == str(tiny_model)
    assert tiny_api.http.get("/get_server_info").json()["model_path"] == str(tiny_model)


def test_seed_server_info(default_api: Api) -> None:
    info = default_api.http.get("/get_server_info").raise_for_status().json()
    for name, kind in {
        "max_total_num_tokens": int, "max_req_input_len": int, "startup_time": float, "version": str, "host": str,
        "port": int, "tp_size": int, "dp_size": int, "page_size": int, "disable_radix_cache": bool,
        "disable_cuda_graph": bool, "chunked_prefill_size": int, "max_prefill_tokens": int, "random_seed": int,
        "max_running_requests": int, "schedule_policy": str, "enable_metrics": bool, "launch_command": str,
        "internal_states": list,
    }.items():  # fmt: skip
        assert type(info[name]) is kind, (name, info[name])
    assert (info["status"], info["frontend"], info["kv_events"], info["speculative_algorithm"]) == (
        "ready", "python", None, None,
    )  # fmt: skip
    assert info["served_model_name"] == MODEL
    assert info["model_path"] == info["tokenizer_path"] == default_api.http.get("/model_info").json()["model_path"]
    assert info["max_req_input_len"] == 8192 - 6
    assert info.keys() - {"startup_time"} == default_api.http.get("/server_info").json().keys() - {"startup_time"}
    (state,) = info["internal_states"]
    assert state["effective_max_running_requests_per_dp"] > 0
    assert state["memory_usage"]["token_capacity"] == info["max_total_num_tokens"]
    assert {"weight", "kvcache", "startup_available", "graph"} <= state["memory_usage"].keys()
    assert {"last_gen_throughput", "world_size", "disaggregation_mode", "decode_cuda_graph_bs"} <= state.keys()
    assert (state["dp_size"], state["attn_dp_size"], state["disable_radix_cache"]) == (1, 1, False)


@pytest.mark.parametrize("path", ["/health_generate", "/health", "/ready", "/ping"])
def test_seed_health(default_api: Api, path: str) -> None:
    response = default_api.http.get(path)
    assert (response.status_code, response.content) == (200, b"")
    assert default_api.http.head(path).status_code == 405


def test_seed_flush_cache(default_api: Api) -> None:
    response = default_api.http.post("/flush_cache")
    assert (response.status_code, response.text) == (200, FLUSHED)
    assert response.headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_seed_round_trip(default_api: Api, prefix: str) -> None:
    for input_text in (
        "SGLang provides efficient tokenization endpoints.", " leading", "日本語 🙂\n\n\tdéjà vu", "2024-01-31", "",
    ):  # fmt: skip
        payload = {"model": MODEL, "prompt": input_text, "add_special_tokens": False}
        result = default_api.post(payload, f"{prefix}/tokenize").raise_for_status().json()
        assert result.keys() == {"tokens", "count", "max_model_len"}
        assert result["count"] == len(result["tokens"]) and result["max_model_len"] > 0
        payload = {"model": MODEL, "tokens": result["tokens"], "skip_special_tokens": True}
        back = default_api.post(payload, f"{prefix}/detokenize").raise_for_status().json()
        assert back == {"text": input_text}


# More of these routes -------------------------------------------------------------------------------------------------


def test_chat_says_paris(default_api: Api) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"messages": messages, "add_generation_prompt": True}
    ids = default_api.post(body, "/tokenize").raise_for_status().json()["tokens"]
    text = default_api.post({"tokens": ids, "skip_special_tokens": False}, "/detokenize").json()["text"]
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    answer = default_api.generate(input_ids=ids, sampling_params={"temperature": 0, "max_new_tokens": 40})
    assert "Paris" in answer["text"]
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"
    last = default_api.stream(text=text, sampling_params={"temperature": 0, "max_new_tokens": 40})[-1]
    assert last["text"] == answer["text"]


def test_tokenize_and_its_errors(tiny_api: Api) -> None:
    with_bos = tiny_api.post({"prompt": "Hello"}, "/tokenize").json()
    bare = tiny_api.post({"prompt": "Hello", "add_special_tokens": False}, "/tokenize").json()
    assert with_bos["tokens"] == [1, *bare["tokens"]]
    assert with_bos["max_model_len"] == 512
    many = tiny_api.post({"prompt": ["Hello", ""]}, "/tokenize").json()
    assert (many["tokens"], many["count"]) == ([with_bos["tokens"], [1]], [with_bos["count"], 1])
    assert tiny_api.post({"tokens": with_bos["tokens"]}, "/detokenize").json() == {"text": "Hello"}
    shown = tiny_api.post({"tokens": with_bos["tokens"], "skip_special_tokens": False}, "/detokenize")
    assert shown.json() == {"text": "<s>Hello"}
    rows = tiny_api.post({"tokens": [with_bos["tokens"], []]}, "/detokenize").json()
    assert rows == {"text": ["Hello", ""]}
    for body, part in (
        ({}, "Exactly one of 'prompt' or 'messages' must be provided."),
        ({"prompt": "a", "messages": []}, "Exactly one of 'prompt' or 'messages' must be provided."),
        ({"prompt": 5}, ""), ({"prompt": ["a", 5]}, ""), ({"messages": "a"}, ""), ("a", ""),
    ):  # fmt: skip
        refused = tiny_api.post(body, "/tokenize")
        assert (refused.status_code, refused.json()["type"]) == (400, "Bad Request")
        assert part in refused.json()["message"]
    contrary = {"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": True}
    broken = tiny_api.post({**contrary, "continue_final_message": True}, "/tokenize")
    assert (broken.status_code, broken.json()["type"]) == (500, "InternalServerError")
    assert broken.json()["message"].startswith("Internal server error during tokenization: ")


def test_detokenize_errors(tiny_api: Api) -> None:
    for tokens in (None, "a", 5, [1.5], ["a"], [1, [2]], [[1], 2], [[[1]]]):
        refused = tiny_api.post({"tokens": tokens}, "/detokenize")
        assert (refused.status_code, refused.json()["type"], refused.json()["code"]) == (400, "Bad Request", 400)
    assert "Field required" in tiny_api.post({}, "/detokenize").json()["message"]
    for foreign in ([-1], [421], [[1], [2**40]]):
        refused = tiny_api.post({"tokens": foreign}, "/detokenize")
        assert (refused.status_code, refused.json()["type"]) == (400, "DecodeError")
        assert refused.json()["message"].startswith("Error decoding tokens: ")
        assert refused.json()["message"].endswith("Input tokens might be invalid for the model.")


def test_models(default_api: Api) -> None:
    answer = default_api.http.get("/v1/models").json()
    (card,) = answer["data"]
    assert answer["object"] == "list" and isinstance(card.pop("created"), int)
    assert card == {
        "id": MODEL, "object": "model", "owned_by": "sglang", "root": MODEL, "parent": None, "max_model_len": 8192,
    }  # fmt: skip
    assert default_api.http.get(f"/v1/models/{MODEL}").json()["id"] == MODEL
    missing = default_api.http.get("/v1/models/some/x")
    assert (missing.status_code, missing.json()) == (404, {"error": {
        "message": "The model 'some/x' does not exist", "type": "invalid_request_error", "param": "model",
        "code": "model_not_found",
    }})  # fmt: skip


def test_paths_and_methods(tiny_api: Api) -> None:
    for path in ("/nothing", "/v1/generate", "/generate/x"):
        missing = tiny_api.http.get(path)
        assert (missing.status_code, missing.json()) == (404, {"detail": "Not Found"})
    wrong = tiny_api.http.delete("/flush_cache")
    assert (wrong.status_code, wrong.json()) == (405, {"detail": "Method Not Allowed"})
    assert set(wrong.headers["allow"].split(", ")) == {"GET", "POST"}
    assert tiny_api.http.get("/health/").status_code == 307
    assert isinstance(tiny_api.http.get("/").json(), str)
    origin = {"Origin": "http://elsewhere", "Access-Control-Request-Method": "POST"}
    assert tiny_api.http.options("/generate", headers=origin).status_code == 200
    for path in ("/tokenize", "/detokenize", "/v1/tokenize"):
        plain = tiny_api.http.post(path, content=b'{"prompt": "a"}', headers={"content-type": "text/plain"})
        assert (plain.status_code, plain.json()["type"]) == (400, "Bad Request")


def test_flush_cache_cases(tiny_api: Api) -> None:
    def cached() -> Any:
        answer = tiny_api.generate(input_ids=list(range(50)), sampling_params={"max_new_tokens": 1})
        return answer["meta_info"]["cached_tokens"]

    cached()
    assert cached() == 49
    assert tiny_api.http.get("/flush_cache", params={"timeout": "60"}).text == FLUSHED
    assert cached() == 0
    for timeout in ("-1", "x", "nan", "inf"):
        refused = tiny_api.http.post("/flush_cache", params={"timeout": timeout})
        assert (refused.status_code, refused.json()["type"]) == (400, "Bad Request")
    with tiny_api.open_stream(text="a", rid="running", sampling_params=LONG) as chunks:
        next(chunks)
        busy = tiny_api.http.post("/flush_cache")
        assert (busy.status_code, busy.text) == (400, "Flush cache failed.\n")
        late = tiny_api.http.post("/flush_cache", params={"timeout": "0.2"})
        assert (late.status_code, late.text) == (400, "Timed out waiting for idle state.")
        with ThreadPoolExecutor(2) as pool:
            begun = [pool.submit(tiny_api.http.post, "/flush_cache", params={"timeout": "60"}) for _ in range(2)]
            while not any(flush.done() for flush in begun):  # one of the two is refused while the other waits
                next(chunks)
            (second,) = [flush.result() for flush in begun if flush.done()]
            assert (second.status_code, second.text) == (400, "Another flush_cache is already in progress.")
            tiny_api.post({"rid": "running"}, "/abort_request")
            (first,) = [flush.result() for flush in begun if flush.result() is not second]
        assert (first.status_code, first.text) == (200, FLUSHED)
    assert cached() == 0


def test_server_info_and_health_under_load(tiny_api: Api) -> None:
    stop = threading.Event()

    def work() -> int:
        rounds = 0
        while not stop.is_set():
            assert len(tiny_api.generate(text="a", sampling_params=greedy(20))["output_ids"]) == 20
            rounds += 1
        return rounds

    with ThreadPoolExecutor(16) as pool:
        workers = [pool.submit(work) for _ in range(8)]
        try:
            infos = list(pool.map(lambda _: tiny_api.http.get("/get_server_info").json(), range(40)))
            healths = list(pool.map(lambda _: tiny_api.http.get("/health").status_code, range(20)))
        finally:
            stop.set()
        assert all(worker.result() for worker in workers)
    assert all(isinstance(info["max_total_num_tokens"], int) and info["version"] for info in infos)
    assert healths == [200] * 20
    tiny_api.wait_idle()


def test_select_as_the_language_front_end_does(default_api: Api) -> None:
    """A shared prefix is cached by a call of 0 tokens, then each choice is scored in one batch."""
    default_api.flush()
    prefix, choices = "The capital of France is", [" Paris", " London", " Berlin"]
    params = {"temperature": 0, "max_new_tokens": 0, "stop": [], "stop_token_ids": [], "regex": None}
    count = default_api.generate(text=prefix, sampling_params=params)["meta_info"]["prompt_tokens"]
    answers = default_api.generate(
        text=[prefix + choice for choice in choices], return_logprob=True, logprob_start_len=count - 1,
        sampling_params=params,
    )  # fmt: skip
    scores = [sum(entry[0] for entry in a["meta_info"]["input_token_logprobs"][1:]) for a in answers]
    assert scores[0] == max(scores)
    assert all(answer["meta_info"]["cached_tokens"] == count - 1 for answer in answers)


def test_turns_reuse_what_went_before(tiny_api: Api) -> None:
    tiny_api.flush()
    history = list(range(10, 40))
    seen = 0
    for turn in range(4):
        body = {"input_ids": history, "lora_path": "", "stream_options": {"include_usage": True}, "model": "m"}
        chunks = tiny_api.stream(**body, sampling_params=greedy(11))
        first = next(chunk for chunk in chunks if chunk["output_ids"])["meta_info"]
        assert first["prompt_tokens"] == len(history)
        assert first["cached_tokens"] >= seen and (turn == 0) == (first["cached_tokens"] == 0)
        seen = len(history) + 11 - 1
        history = [*history, *chunks[-1]["output_ids"], 100 + turn]
