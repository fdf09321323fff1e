"""The routes of a real frontend process with a fake ring behind it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from fake_messages import fake_logprob
from fake_ring import Live, call, expected, text_of

from engine.wire.to_scheduler import FlushCache
from engine.wire.to_tokenizer import Generate, Tokenize


def test_plain_answer(live: Live) -> None:
    answer = live.client.post("/generate", json=call(rid="mine", return_prompt_token_ids=True)).json()
    text, ids = expected("hello", 4)
    meta = answer.pop("meta_info")
    assert answer == {"text": text, "output_ids": ids, "prompt_token_ids": [ord(letter) for letter in "hello"]}
    assert meta.pop("e2e_latency") > 0
    assert meta.pop("response_sent_to_client_ts") > 1.7e9
    assert meta == {
        "id": "mine",
        "finish_reason": {"type": "length", "length": 4},
        "prompt_tokens": 5,
        "completion_tokens": 4,
        "cached_tokens": 2,
        "cached_tokens_details": None,
        "weight_version": "default",
        "num_retractions": 0,
        "reasoning_tokens": 0,
        "dp_rank": None,
    }


def test_batches_and_samples(live: Live) -> None:
    assert live.client.post("/generate", json=call([])).json() == []
    answers = live.client.put("/generate", json=call(["ab", "abcd"], rid="b")).json()
    assert [answer["text"] for answer in answers] == [expected("ab", 4)[0], expected("abcd", 4)[0]]
    assert [answer["meta_info"]["id"] for answer in answers] == ["b_0", "b_1"]
    sampled = call("ab", rid="s")
    sampled["sampling_params"]["n"] = 3
    samples = live.client.post("/generate", json=sampled).json()
    assert len({sample["meta_info"]["id"] for sample in samples} - {"s"}) == 3
    warmers = [message for message in live.ring.kinds(Generate) if message.sampling.max_new_tokens == 0]
    assert [message.text for message in warmers] == ["ab"]


def test_logprobs_with_text(live: Live) -> None:
    body = call("abc", 2, return_logprob=True, logprob_start_len=1, top_logprobs_num=2, return_text_in_logprobs=True)
    meta = live.client.post("/generate", json=body).json()["meta_info"]
    prompt = [ord(letter) for letter in "bc"]
    assert meta["input_token_logprobs"] == [
        [None, prompt[0], text_of(prompt[0])],
        [-1.5, prompt[1], text_of(prompt[1])],
    ]
    assert meta["input_top_logprobs"][0] is None
    assert meta["output_token_logprobs"] == [[-0.5, 3, text_of(3)], [-0.5, 4, text_of(4)]]
    assert meta["output_top_logprobs"][1] == [[-0.5, 4, text_of(4)], [-1.5, 5, text_of(5)]]
    scored = fake_logprob([ord(letter) for letter in "abc"], 8)
    nothing = call("abc", 0, return_logprob=True, token_ids_logprob=[8])
    meta = live.client.post("/generate", json=nothing).json()["meta_info"]
    assert (meta["output_token_logprobs"], meta["output_token_ids_logprobs"]) == ([], [[[scored, 8, None]]])
    assert meta["finish_reason"] == {"type": "length", "length": 0}


def test_routes_methods_and_slashes(live: Live) -> None:
    client = live.client
    assert (client.get("/nope").status_code, client.get("/nope").json()) == (404, {"detail": "Not Found"})
    wrong = client.get("/generate")
    assert (wrong.status_code, wrong.json()) == (405, {"detail": "Method Not Allowed"})
    assert set(wrong.headers["allow"].split(", ")) == {"POST", "PUT"}
    assert client.head("/health").status_code == 405
    for path in ("/model_info/", "/v1/models/"):
        moved = client.get(path)
        assert (moved.status_code, moved.headers["location"].endswith(path.rstrip("/"))) == (307, True)
    assert client.head("/").status_code == client.get("/").status_code == 200
    asked = {"Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "authorization, x-own"}
    preflight = client.options("/generate", headers={"Origin": "http://a"} | asked)
    assert preflight.status_code == 200, preflight.text
    crossed = preflight.headers
    assert "PUT" in crossed["access-control-allow-methods"]
    assert {"authorization", "x-own"} <= set(crossed["access-control-allow-headers"].replace(" ", "").split(","))
    assert crossed["access-control-allow-origin"] in ("*", "http://a")
    assert crossed["access-control-allow-credentials"] == "true"
    assert client.get("/health", headers={"Origin": "http://a"}).headers["access-control-allow-origin"]


def test_information(live: Live) -> None:
    nine = live.client.get("/get_model_info").json()
    assert nine == live.client.get("/model_info").json()
    assert nine == {
        "model_path": "org/model-x",
        "tokenizer_path": "org/model-x",
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": "default",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
    }
    with ThreadPoolExecutor(8) as pool:
        infos = list(pool.map(lambda _: live.client.get("/server_info").json(), range(16)))
    state = infos[0]["internal_states"][0]
    assert all(info["status"] == "ready" and info["max_total_num_tokens"] == 4096 for info in infos)
    assert (state["last_gen_throughput"], state["memory_usage"]["token_capacity"]) == (1.5, 4096)
    assert state["effective_max_running_requests_per_dp"] > 0
    assert infos[0]["random_seed"] == 3
    (card,) = live.client.get("/v1/models", headers={"Authorization": "Bearer None"}).json()["data"]
    assert (card["id"], card["max_model_len"]) == ("org/model-x", 4096)
    assert live.client.get("/v1/models/org/model-x").json() == card
    missing = live.client.get("/v1/models/other/x")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_tokenize_and_detokenize(live: Live) -> None:
    client = live.client
    one = client.post("/tokenize", json={"prompt": "hé"})
    assert one.json() == {"tokens": [104, 233], "count": 2, "max_model_len": 8192}
    many = client.post("/v1/tokenize", json={"prompt": ["a", "bc"], "add_special_tokens": False})
    assert many.json() == {"tokens": [[97], [98, 99]], "count": [1, 2], "max_model_len": 8192}
    assert not live.ring.kinds(Tokenize)[-1].add_special_tokens
    for both in ({}, {"prompt": "a", "messages": []}):
        refused = client.post("/tokenize", json=both)
        assert refused.status_code == 400
        assert "Exactly one of 'prompt' or 'messages' must be provided." in refused.json()["message"]
    assert client.post("/tokenize", content="{}", headers={"content-type": "text/plain"}).status_code == 400
    broken = client.post("/tokenize", json={"prompt": "BREAK"})
    assert (broken.status_code, broken.json()["type"]) == (500, "InternalServerError")
    assert broken.json()["message"].startswith("Internal server error during tokenization: ")

    assert client.post("/detokenize", json={"tokens": [104, 233]}).json() == {"text": "hé"}
    assert client.post("/v1/detokenize", json={"tokens": [[97], []]}).json() == {"text": ["a", ""]}
    assert client.post("/detokenize", json={"tokens": []}).json() == {"text": ""}
    for wrong in ([1, [2]], ["a"], [1.0], "a", None):
        assert client.post("/detokenize", json={"tokens": wrong}).json()["type"] == "Bad Request"
    assert "Field required" in client.post("/detokenize", json={}).json()["message"]
    for ids in ([-1], [1000], [[1], [2**62]]):
        undecodable = client.post("/detokenize", json={"tokens": ids})
        assert (undecodable.status_code, undecodable.json()["type"]) == (400, "DecodeError")


def test_expert_records_need_a_mode(live: Live) -> None:
    wanted = "Please set ServerArgs.expert_distribution_recorder_mode to use ExpertDistributionRecorder."
    for action in ("start", "stop", "dump"):
        for method in ("GET", "POST"):
            refused = live.client.request(method, f"/{action}_expert_distribution_record", content=b"x")
            assert (refused.status_code, refused.json()) == (400, {"error": {"message": wanted}})
        assert live.client.put(f"/{action}_expert_distribution_record").status_code == 405


def test_flush(live: Live) -> None:
    client = live.client
    done = client.post("/flush_cache?timeout=60", content=b"not json")
    assert (done.status_code, done.headers["content-type"].startswith("text/plain")) == (200, True)
    assert done.text.startswith("Cache flushed.\nPlease check backend logs")
    assert live.ring.kinds(FlushCache)[-1].timeout == 60
    assert client.get("/flush_cache").status_code == 200
    for wrong in ("-1", "x", "nan"):
        refused = client.get(f"/flush_cache?timeout={wrong}")
        assert (refused.status_code, refused.json()["type"]) == (400, "Bad Request")
    live.ring.hold.set()
    try:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(client.post, "/generate", json=call("a"))
            live.ring.wait_for(lambda: bool(live.ring.running))
            assert (client.get("/flush_cache").status_code, client.get("/flush_cache").text) == (
                400,
                "Flush cache failed.\n",
            )
            assert client.get("/flush_cache?timeout=0.1").text == "Timed out waiting for idle state."
            live.ring.hold.clear()
            assert running.result().status_code == 200
    finally:
        live.ring.hold.clear()
