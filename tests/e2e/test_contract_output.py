"""/generate's answers on a tiny random model: meta_info, logprobs, streams, aborts, disconnects (contract §7)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_client import Api, Json, check_growth, greedy

from engine.bench.live_server import running_server

PROMPT = "The quick brown fox jumps over the lazy dog. def add(a, b): return"
LONG = greedy(15_000)
KEYS = {
    "id", "finish_reason", "prompt_tokens", "completion_tokens", "cached_tokens", "cached_tokens_details",
    "weight_version", "num_retractions", "reasoning_tokens", "dp_rank", "e2e_latency", "response_sent_to_client_ts",
}  # fmt: skip
ABORTED = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}


@pytest.fixture(scope="module")
def chunked_api(tiny_model: Path) -> Iterator[Api]:
    """Prompts in chunks of 16 tokens, streams of deltas."""
    flags = ("--dtype", "float32", "--max-total-tokens", "20000", "--chunked-prefill-size", "16")
    strict = {"TOKENMILL_STRICT": "1"}
    with running_server(*flags, "--incremental-streaming-output", model=tiny_model, env=strict) as server:
        yield Api(server.url)


def test_meta_info_has_exactly_these_keys(tiny_api: Api) -> None:
    body: Json = {"text": PROMPT, "sampling_params": greedy(3)}
    answer = tiny_api.generate(**body)
    assert answer.keys() == {"text", "output_ids", "meta_info"}
    assert answer["meta_info"].keys() == KEYS
    asked = tiny_api.generate(**body, return_logprob=True, return_prompt_token_ids=True)
    assert asked.keys() == {"text", "output_ids", "meta_info", "prompt_token_ids"}
    logprobs = {"input_token_logprobs", "output_token_logprobs", "output_token_logprobs_length"}
    assert asked["meta_info"].keys() == KEYS | logprobs
    both = {"top_logprobs_num": 1, "token_ids_logprob": [3]}
    assert tiny_api.generate(**body, **both)["meta_info"].keys() == KEYS
    more = {"input_top_logprobs", "output_top_logprobs", "input_token_ids_logprobs", "output_token_ids_logprobs"}
    assert tiny_api.generate(**body, **both, return_logprob=True)["meta_info"].keys() == KEYS | logprobs | more
    # A stream of few tokens may come in one event: the tiny model is quicker than the pipeline behind it.
    first, *_, last = tiny_api.stream(**body | {"sampling_params": greedy(100)})
    assert first["meta_info"].keys() >= KEYS - {"e2e_latency"} and last["meta_info"].keys() >= KEYS - {
        "response_sent_to_client_ts"
    }
    assert "index" not in first


def options() -> list[Json]:
    """All combinations; the start is counted from the prompt's end where it is beyond 0 and 1."""
    wide = itertools.product([None, 0, 1, 5], [None, [], [9, 4, 9]], [-1, 0, 1, 17, 32, "last", "end"])
    return [{"top_logprobs_num": top, "token_ids_logprob": ids, "logprob_start_len": at} for top, ids, at in wide]


def check_lists(answer: Json, prompt: list[int], body: Json) -> None:
    """The lengths and ids of every logprob list that was asked for."""
    meta, start, count = answer["meta_info"], body["logprob_start_len"], len(answer["output_ids"])
    expected = [] if start == -1 else prompt[start:]
    assert [entry[1] for entry in meta["input_token_logprobs"]] == expected
    assert [entry[0] is None for entry in meta["input_token_logprobs"]] == [i == 0 for i in range(len(expected))]
    assert [entry[1] for entry in meta["output_token_logprobs"]] == answer["output_ids"]
    assert meta["output_token_logprobs_length"] == meta["completion_tokens"] == count
    values = [entry[0] for entry in meta["input_token_logprobs"][1:] + meta["output_token_logprobs"]]
    assert all(-3.4028234663852886e38 <= value <= 0 for value in values)
    top, ids = body["top_logprobs_num"], body["token_ids_logprob"]
    assert ("input_top_logprobs" in meta, "output_top_logprobs" in meta) == (bool(top), bool(top))
    assert ("input_token_ids_logprobs" in meta, "output_token_ids_logprobs" in meta) == (bool(ids), bool(ids))
    if top:
        _check_rows(meta["input_top_logprobs"], len(expected), top)
        assert [len(row) for row in meta["output_top_logprobs"]] == [top] * count
        assert [row[0] for row in meta["output_top_logprobs"]] == meta["output_token_logprobs"]
        for row in meta["input_top_logprobs"][1:] + meta["output_top_logprobs"]:
            assert row == sorted(row, key=lambda entry: -entry[0])
    if ids:
        _check_rows(meta["input_token_ids_logprobs"], len(expected), len(ids))
        for row in meta["input_token_ids_logprobs"][1:] + meta["output_token_ids_logprobs"]:
            assert [entry[1] for entry in row] == ids
        assert len(meta["output_token_ids_logprobs"]) == count


def _check_rows(rows: list[Any], count: int, width: int) -> None:
    assert [row if row is None else len(row) for row in rows] == ([None] + [width] * (count - 1))[:count]


@pytest.mark.parametrize("small_chunks", [False, True])
def test_logprob_lists(tiny_api: Api, chunked_api: Api, small_chunks: bool) -> None:
    """Cold and with a warm cache, the same values in big and small chunks."""
    api = chunked_api if small_chunks else tiny_api
    api.flush()
    prompt = [(7 * i) % 400 + 5 for i in range(41)]
    for i, body in enumerate(options()):
        body["logprob_start_len"] = {"last": 40, "end": 41}.get(body["logprob_start_len"], body["logprob_start_len"])
        count = i % 4 + 1
        request = {"input_ids": prompt, "return_logprob": True, **body, "sampling_params": greedy(count)}
        answer = api.generate(**request)
        check_lists(answer, prompt, body)
        if i % 7 == 0:
            again = tiny_api.generate(**request)
            for name in ("input_token_logprobs", "output_token_logprobs"):
                mine, other = answer["meta_info"][name], again["meta_info"][name]
                assert [e[1] for e in mine] == [e[1] for e in other]
                assert [e[0] or 0 for e in mine] == pytest.approx([e[0] or 0 for e in other], abs=1e-3)


def test_logprobs_of_a_batch(chunked_api: Api) -> None:
    prompts = [[10, 11, 12], [20, 21], list(range(30, 70))]
    answers = chunked_api.generate(
        input_ids=prompts,
        return_logprob=[True, True, True],
        logprob_start_len=[0, -1, 33],
        top_logprobs_num=[0, 2, 3],
        token_ids_logprob=[[1], [2, 3], [4]],
        sampling_params=greedy(4),
    )
    for i, answer in enumerate(answers):
        part = {"logprob_start_len": (0, -1, 33)[i], "top_logprobs_num": (0, 2, 3)[i]}
        check_lists(answer, prompts[i], {**part, "token_ids_logprob": ([1], [2, 3], [4])[i]})
    flat = chunked_api.generate(
        input_ids=prompts, return_logprob=True, token_ids_logprob=[8, 9], sampling_params=greedy(2)
    )
    assert all([e[1] for e in a["meta_info"]["output_token_ids_logprobs"][0]] == [8, 9] for a in flat)


def test_rescoring_gives_the_same_logprobs(tiny_api: Api) -> None:
    body = {"text": PROMPT, "return_logprob": True, "return_prompt_token_ids": True}
    answer = tiny_api.generate(**body, sampling_params={"max_new_tokens": 20, "ignore_eos": True})
    whole = [*answer["prompt_token_ids"], *answer["output_ids"]]
    scored = tiny_api.generate(
        input_ids=whole, return_logprob=True, logprob_start_len=0, sampling_params={"max_new_tokens": 0}
    )["meta_info"]["input_token_logprobs"]
    expected = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
    assert [entry[0] for entry in scored[-20:]] == pytest.approx(expected, abs=1e-3)


def test_texts_in_logprobs_join_to_the_text(default_api: Api) -> None:
    text = "The seven colours of the rainbow are red, orange, yellow"
    answer = default_api.generate(
        text=text, return_logprob=True, logprob_start_len=4, return_text_in_logprobs=True, top_logprobs_num=2,
        sampling_params=greedy(4),
    )  # fmt: skip
    meta = answer["meta_info"]
    assert meta["prompt_tokens"] == 4 + len(meta["input_token_logprobs"])
    assert text.endswith("".join(entry[2] for entry in meta["input_token_logprobs"]))
    assert meta["completion_tokens"] == 4
    assert "".join(entry[2] for entry in meta["output_token_logprobs"]) == answer["text"]
    assert all(isinstance(entry[2], str) for row in meta["output_top_logprobs"] for entry in row)


def test_cumulative_streams(tiny_api: Api) -> None:
    body = {
        "text": PROMPT, "return_logprob": True, "top_logprobs_num": 2, "token_ids_logprob": [3], "logprob_start_len": 2,
        "sampling_params": greedy(30),
    }  # fmt: skip
    answer = tiny_api.generate(**body)
    chunks = tiny_api.stream(**body)
    last = check_growth(chunks)
    assert (last["text"], last["output_ids"]) == (answer["text"], answer["output_ids"])
    assert chunks[0]["output_ids"]
    for chunk in chunks:
        meta = chunk["meta_info"]
        count = len(chunk["output_ids"])
        assert meta["output_token_logprobs_length"] == count
        for name in ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs"):
            assert len(meta[name]) == count
            assert meta[name] == last["meta_info"][name][:count]
        for name in ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs"):
            assert meta[name] == last["meta_info"][name] and meta[name]
    many = tiny_api.stream(text=[PROMPT, "a", "b"], sampling_params=greedy(9))
    assert {chunk["index"] for chunk in many} == {0, 1, 2}
    for index in range(3):
        assert len(check_growth([chunk for chunk in many if chunk["index"] == index])["output_ids"]) == 9


def test_incremental_streams(chunked_api: Api) -> None:
    body = {"text": PROMPT, "return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": 0}
    answer = chunked_api.generate(**body, sampling_params=greedy(30))
    chunks = chunked_api.stream(**body, sampling_params=greedy(30))
    assert "".join(chunk["text"] for chunk in chunks) == answer["text"]
    assert [token for chunk in chunks for token in chunk["output_ids"]] == answer["output_ids"]
    for name in ("output_token_logprobs", "output_top_logprobs"):
        rows = [row for chunk in chunks for row in chunk["meta_info"][name]]
        assert len(rows) == 30 and all(len(c["meta_info"][name]) == len(c["output_ids"]) for c in chunks)
    sums = list(itertools.accumulate(len(chunk["output_ids"]) for chunk in chunks))
    assert [chunk["meta_info"]["completion_tokens"] for chunk in chunks] == sums
    assert [chunk["meta_info"]["output_token_logprobs_length"] for chunk in chunks] == sums
    assert all(len(c["meta_info"]["input_token_logprobs"]) == answer["meta_info"]["prompt_tokens"] for c in chunks)


def test_one_bad_item_in_a_streamed_batch(tiny_api: Api) -> None:
    chunks = tiny_api.stream(text=["a", "b"], sampling_params=[greedy(3), greedy(3, top_k=0)])
    (error,) = [chunk for chunk in chunks if "error" in chunk]
    assert error["error"]["message"] == "top_k must be -1 (disable) or at least 1, got 0."
    assert len(check_growth([chunk for chunk in chunks if "error" not in chunk])["output_ids"]) == 3
    plain = tiny_api.post({"text": ["a", "b"], "sampling_params": [LONG, greedy(3, top_k=0)]})
    assert plain.status_code == 400
    tiny_api.wait_idle()


# Aborts and disconnects (§7.6) --------------------------------------------------------------------------------------


def test_abort_of_running_requests(tiny_api: Api) -> None:
    with ThreadPoolExecutor(4) as pool:
        plain = pool.submit(tiny_api.generate, text="a", rid="group-a", sampling_params=LONG)
        batch = pool.submit(tiny_api.generate, text=["b", "c"], rid="group-b", sampling_params=LONG)
        streamed = pool.submit(tiny_api.stream, text="d", rid="group-c", sampling_params=LONG)
        with tiny_api.open_stream(text="e", rid="other", sampling_params=LONG) as chunks:
            tiny_api.wait_until(num_running_reqs=5)
            assert next(chunks)["meta_info"]["finish_reason"] is None
            done = tiny_api.post({"rid": "group"}, "/abort_request")
            assert (done.status_code, done.content) == (200, b"")
            answers = [plain.result(), *batch.result(), check_growth(streamed.result())]
            assert tiny_api.wait_until(num_running_reqs=1)["num_waiting_reqs"] == 0
            tiny_api.post({"abort_all": True}, "/abort_request")
            answers.append(list(chunks)[-1])
    assert [answer["meta_info"]["finish_reason"] for answer in answers] == [ABORTED] * 5
    for answer in answers:
        assert len(answer["output_ids"]) == answer["meta_info"]["completion_tokens"] < 15_000
    tiny_api.wait_idle()


def test_abort_of_parallel_samples_by_the_rid_that_was_asked(tiny_api: Api) -> None:
    with ThreadPoolExecutor(1) as pool:
        samples = pool.submit(tiny_api.generate, text="a", rid="family", sampling_params={**LONG, "n": 3})
        tiny_api.wait_until(num_running_reqs=3)
        tiny_api.post({"rid": "fam"}, "/abort_request")
        assert [answer["meta_info"]["finish_reason"] for answer in samples.result()] == [ABORTED] * 3
    tiny_api.wait_idle()


def test_aborts_that_name_nobody(tiny_api: Api) -> None:
    for body in ({}, {"rid": ""}, {"rid": "nobody"}, {"rid": "x", "ignored": 1}):
        assert tiny_api.post(body, "/abort_request").status_code == 200
    missing = tiny_api.http.post("/abort_request")
    assert (missing.status_code, "Field required" in missing.json()["message"]) == (400, True)


def test_a_client_that_goes_away_frees_its_slot(tiny_api: Api) -> None:
    with tiny_api.open_stream(text="a", sampling_params=LONG) as kept:
        next(kept)
        with tiny_api.open_stream(text="b", sampling_params=LONG) as chunks:
            next(chunks)
            tiny_api.wait_until(num_running_reqs=2)
        tiny_api.wait_until(num_running_reqs=1)
        with pytest.raises(httpx.ReadTimeout):  # a call that does not stream, and several items of one
            httpx.post(f"{tiny_api.url}/generate", json={"text": ["c"] * 3, "sampling_params": LONG}, timeout=0.5)
        tiny_api.wait_until(num_running_reqs=1, num_waiting_reqs=0)
        before = next(kept)["meta_info"]["completion_tokens"]
        assert next(kept)["meta_info"]["completion_tokens"] > before
    tiny_api.wait_idle()
    free = tiny_api.state()
    assert free["num_free_tokens"] + free["num_cached_tokens"] == 40_000


def test_a_mass_of_impatient_clients(tiny_api: Api) -> None:
    def impatient(number: int) -> None:
        with pytest.raises(httpx.ReadTimeout):
            body = {"text": f"client {number}", "sampling_params": LONG}
            httpx.post(f"{tiny_api.url}/generate", json=body, timeout=httpx.Timeout(30, read=0.5))

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(impatient, range(24)))
    tiny_api.wait_idle()
    assert tiny_api.http.get("/health").status_code == 200
