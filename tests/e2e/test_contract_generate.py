"""/generate on a tiny random model: layouts, the prefix cache, sampling and stops (contract §5 and §6)."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from live_client import Api, Json, check_growth, greedy
from tokenizers import Tokenizer

EOS = 2
PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_model / "tokenizer.json"))


def sampled(tokens: int, **more: Any) -> Json:
    return {"max_new_tokens": tokens, "ignore_eos": True, **more}


def run(api: Api, prompt: str = PROMPT, **params: Any) -> Json:
    answer: Json = api.generate(text=prompt, sampling_params=params)
    return answer


def finish(answer: Json) -> Any:
    return answer["meta_info"]["finish_reason"]


# Layouts and requests (§5) ------------------------------------------------------------------------------------------


def test_single_and_batch(tiny_api: Api, tokenizer: Tokenizer) -> None:
    one = tiny_api.generate(text=PROMPT, sampling_params=greedy(5))
    ids = tokenizer.encode(PROMPT).ids
    assert one["output_ids"] == tiny_api.generate(input_ids=ids, sampling_params=greedy(5))["output_ids"]
    for body in ({"text": [PROMPT]}, {"input_ids": [ids]}):
        (only,) = tiny_api.generate(**body, sampling_params=greedy(5))
        assert only["output_ids"] == one["output_ids"]
    other = tiny_api.generate(text="Hello", sampling_params=greedy(3))
    both = tiny_api.generate(
        text=[PROMPT, "Hello", PROMPT],
        sampling_params=[greedy(5), greedy(3), {"max_new_tokens": 0}],
        return_logprob=[False, True, False],
        return_prompt_token_ids=True,
    )
    assert [answer["text"] for answer in both] == [one["text"], other["text"], ""]
    assert [answer["prompt_token_ids"] for answer in both] == [ids, tokenizer.encode("Hello").ids, ids]
    assert ["output_token_logprobs" in answer["meta_info"] for answer in both] == [False, True, False]
    assert finish(both[2]) == {"type": "length", "length": 0}


def test_rids(tiny_api: Api) -> None:
    short = {"sampling_params": {"max_new_tokens": 1}}

    def ids(**body: Any) -> list[str]:
        return [answer["meta_info"]["id"] for answer in tiny_api.generate(**body, **short)]

    assert tiny_api.generate(text="a", rid="mine", **short)["meta_info"]["id"] == "mine"
    assert ids(text=["a", "b"], rid="mine") == ["mine_0", "mine_1"]
    assert ids(text=["a", "b"], rid=["x", "y"]) == ["x", "y"]
    made = [*ids(text=["a", "b"]), tiny_api.generate(text="a", **short)["meta_info"]["id"]]
    assert len(set(made)) == 3 and all(re.fullmatch("[0-9a-f]{32}", rid) for rid in made)


def test_parallel_samples(tiny_api: Api) -> None:
    tiny_api.flush()
    prompts = [PROMPT, "Hello world"]
    params = sampled(6, n=3, sampling_seed=7)
    answers = tiny_api.generate(text=prompts, rid=["p", "q"], sampling_params=params)
    assert len(answers) == 6
    assert len({answer["meta_info"]["id"] for answer in answers} | {"p", "q"}) == 8
    for i, prompt in enumerate(prompts):
        mine = answers[3 * i : 3 * i + 3]
        count = mine[0]["meta_info"]["prompt_tokens"]
        assert all(answer["meta_info"]["cached_tokens"] == count - 1 for answer in mine)
        assert len({answer["text"] for answer in mine}) == 3
        assert mine[0]["text"] == run(tiny_api, prompt, **sampled(6, sampling_seed=7))["text"]
    equal = tiny_api.generate(text=PROMPT, sampling_params=greedy(5, n=4))
    assert len(equal) == 4 and len({answer["text"] for answer in equal}) == 1
    chunks = tiny_api.stream(text=prompts, sampling_params=params)
    for index, answer in enumerate(answers):
        assert check_growth([chunk for chunk in chunks if chunk["index"] == index])["text"] == answer["text"]


def test_the_cache_as_clients_see_it(tiny_api: Api) -> None:
    tiny_api.flush()
    found = []
    for length in (100, 10_000, 10_000, 1_000, 11_000):
        prompt = [i % 421 for i in range(length)]
        answer = tiny_api.generate(input_ids=prompt, sampling_params={"max_new_tokens": 1})
        found.append(answer["meta_info"]["cached_tokens"])
        assert answer["meta_info"]["prompt_tokens"] == length
    assert found == [0, 100, 9_999, 999, 10_000]


def test_outputs_are_cached_and_keys_separate(tiny_api: Api) -> None:
    tiny_api.flush()
    prompt = list(range(3, 43))

    def cached(prompt: list[int], **keys: Any) -> int:
        meta = tiny_api.generate(input_ids=prompt, sampling_params={"max_new_tokens": 0}, **keys)["meta_info"]
        return int(meta["cached_tokens"])

    first = tiny_api.generate(input_ids=prompt, sampling_params=greedy(9))
    assert first["meta_info"]["cached_tokens"] == 0
    assert cached([*prompt, *first["output_ids"], 5]) == 40 + 9 - 1
    for keys in ({"extra_key": "k"}, {"cache_salt": "k"}, {"extra_key": "k", "cache_salt": "s"}, {"extra_key": "ks"}):
        assert cached(prompt, **keys) == 0
        assert cached(prompt, **keys) == 39
    assert cached(prompt, extra_key="", cache_salt="") == 39
    answers = tiny_api.generate(
        input_ids=[prompt] * 2, extra_key=["k", "new"], sampling_params={"max_new_tokens": 0}
    )  # fmt: skip
    assert [answer["meta_info"]["cached_tokens"] for answer in answers] == [39, 0]
    scored = tiny_api.generate(
        input_ids=prompt, return_logprob=True, logprob_start_len=10, sampling_params={"max_new_tokens": 0}
    )
    assert scored["meta_info"]["cached_tokens"] <= 10


def test_nothing_new(tiny_api: Api) -> None:
    for body in ({}, {"return_logprob": True, "token_ids_logprob": [5, 7], "top_logprobs_num": 2}):
        answer = tiny_api.generate(text=PROMPT, **body, sampling_params={"max_new_tokens": 0})
        meta = answer["meta_info"]
        assert (answer["text"], answer["output_ids"], meta["completion_tokens"]) == ("", [], 0)
        assert meta["finish_reason"] == {"type": "length", "length": 0}
    assert (meta["output_token_logprobs"], meta["output_top_logprobs"]) == ([], [])
    ((five, seven),) = meta["output_token_ids_logprobs"]
    ahead = tiny_api.generate(
        text=PROMPT, return_logprob=True, token_ids_logprob=[5, 7], sampling_params={"max_new_tokens": 1}
    )["meta_info"]["output_token_ids_logprobs"]
    assert [entry[1] for entry in (five, seven)] == [5, 7]
    assert [entry[0] for entry in ahead[0]] == pytest.approx([five[0], seven[0]], abs=1e-4)


def test_length_by_default(tiny_api: Api) -> None:
    default = run(tiny_api, "a", temperature=0, ignore_eos=True)
    assert (default["meta_info"]["completion_tokens"], finish(default)) == (128, {"type": "length", "length": 128})
    assert len(tiny_api.generate(text="a")["output_ids"]) <= 128


# Stops (§6.3, §6.4) -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tiny_api: Api) -> Json:
    """A greedy answer with multi-byte text in it, to be stopped at various places."""
    for prompt in (PROMPT, "日本語", "naïve café", "def add", "Hello", "The dog", "🙂"):
        answer = run(tiny_api, prompt, **greedy(60))
        if sum(len(char.encode()) > 1 and char != "\ufffd" for char in answer["text"][5:]) >= 2:
            return {**answer, "prompt": prompt}
    raise AssertionError("no prompt makes multi-byte text; choose others")


def both(api: Api, prompt: str, params: Json) -> Json:
    """The answer, which must be the same when streamed, while nothing is shown that is taken back later."""
    answer = run(api, prompt, **params)
    last = check_growth(api.stream(text=prompt, sampling_params=params))
    assert (last["text"], last["output_ids"], finish(last)) == (answer["text"], answer["output_ids"], finish(answer))
    return answer


def test_stop_strings(tiny_api: Api, plain: Json) -> None:
    text = plain["text"]
    wide = next(i for i, char in enumerate(text) if i > 5 and len(char.encode()) > 1 and char != "\ufffd")
    for at, size in ((4, 1), (6, 5), (wide, 1), (wide - 2, 6), (10, 12)):
        stop = text[at : at + size]
        cut = text.index(stop)
        for params, shown in (({}, text[:cut]), ({"no_stop_trim": True}, text[:cut] + stop)):
            answer = both(tiny_api, plain["prompt"], greedy(60, stop=["\0never", stop], **params))
            assert (answer["text"], finish(answer)) == (shown, {"type": "stop", "matched": stop})
            count = answer["meta_info"]["completion_tokens"]
            assert answer["output_ids"] == plain["output_ids"][:count] and count <= 60
    nothing = both(tiny_api, plain["prompt"], greedy(60, stop=[], stop_token_ids=[], stop_regex=""))
    assert nothing["text"] == text


def test_stop_patterns(tiny_api: Api, plain: Json) -> None:
    text = plain["text"]
    answer = both(tiny_api, plain["prompt"], greedy(60, stop_regex=["never(?!)", r".{7}"]))
    assert finish(answer) == {"type": "stop", "matched": ".{7}"}
    assert text.startswith(answer["text"]) and re.search(".{7}", answer["text"], re.DOTALL)
    word = text[6:9]
    if re.escape(word) == word:  # a pattern that occurs as it is written is cut like a stop string
        answer = both(tiny_api, plain["prompt"], greedy(60, stop_regex=word))
        assert (answer["text"], finish(answer)["matched"]) == (text[: text.index(word)], word)


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(x+x+)+y|(a|aa)+$b"])
def test_a_pattern_that_backtracks_without_end_stops_nobody_else(
    tiny_api: Api, tokenizer: Tokenizer, pattern: str
) -> None:
    letter = tokenizer.token_to_id("a")
    params = greedy(400, logit_bias={str(letter): 1000}, stop_regex=pattern)
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(run, tiny_api, **greedy(400))
        answer = tiny_api.post({"text": "a", "sampling_params": params})
        assert len(beside.result()["output_ids"]) == 400
    if answer.status_code == 200:
        assert answer.json()["text"] == "a" * 400
    else:
        message = answer.json()["error"]["message"]
        assert message.startswith(f"stop_regex {pattern!r} was given up: ")


def test_stop_tokens_and_eos(tiny_api: Api, plain: Json, tokenizer: Tokenizer) -> None:
    ids = plain["output_ids"]
    stop = ids[7]
    cut = ids.index(stop) + 1
    greedily = {"temperature": 0, "max_new_tokens": 60}
    answer = both(tiny_api, plain["prompt"], {**greedily, "stop_token_ids": [419, stop]})
    assert (answer["output_ids"], finish(answer)) == (ids[:cut], {"type": "stop", "matched": stop})
    kept = both(tiny_api, plain["prompt"], {**greedily, "stop_token_ids": [stop], "no_stop_trim": True})
    assert kept["output_ids"] == ids[:cut] and kept["text"].startswith(answer["text"])
    assert both(tiny_api, plain["prompt"], greedy(60, stop_token_ids=[stop]))["text"] == plain["text"]
    forced: Json = {"logit_bias": {str(EOS): 1000}}
    ended = both(tiny_api, PROMPT, {"max_new_tokens": 5, **forced})
    assert (ended["text"], ended["output_ids"], finish(ended)) == ("", [EOS], {"type": "stop", "matched": EOS})
    shown = both(tiny_api, PROMPT, {"max_new_tokens": 5, **forced, "no_stop_trim": True, "skip_special_tokens": False})
    assert shown["text"] == "</s>"
    assert run(tiny_api, **sampled(3, **forced))["output_ids"] == [EOS] * 3
    later = run(tiny_api, max_new_tokens=8, min_new_tokens=4, temperature=0, **forced, stop_token_ids=[stop])
    assert later["output_ids"][4:] == [EOS] and not {EOS, stop} & set(later["output_ids"][:4])
    assert run(tiny_api, **sampled(2, **forced))["text"] == ""
    assert run(tiny_api, **sampled(2, **forced, skip_special_tokens=False))["text"] == "</s></s>"


def test_text_is_the_decoded_ids(tiny_api: Api, plain: Json, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(plain["prompt"]).ids
    whole = tokenizer.decode([*prompt, *plain["output_ids"]])
    assert whole == tokenizer.decode(prompt) + plain["text"]


# Sampling (§6.1, §6.2, §6.7) ----------------------------------------------------------------------------------------


def test_logit_bias(tiny_api: Api) -> None:
    for params in ({}, {"temperature": 0}, {"top_k": 5}):
        assert run(tiny_api, **sampled(5, logit_bias={"77": 100}, **params))["output_ids"] == [77] * 5
        banned = {str(token): -100 for token in range(421) if token not in (50, 60, 70)}
        assert set(run(tiny_api, **sampled(20, logit_bias=banned, **params))["output_ids"]) <= {50, 60, 70}


def test_penalties(tiny_api: Api) -> None:
    narrow = {str(token): 30 for token in range(100, 110)}
    free = run(tiny_api, **greedy(10, logit_bias=narrow))["output_ids"]
    assert set(free) <= set(range(100, 110))
    pushed = run(tiny_api, **greedy(60, presence_penalty=2, frequency_penalty=2))["output_ids"]
    plain = run(tiny_api, **greedy(60))["output_ids"]
    assert len(set(pushed)) > len(set(plain)) or len(set(plain)) > 50
    stuck = run(tiny_api, **greedy(60, frequency_penalty=-2))["output_ids"]
    assert len(set(stuck)) < len(set(plain))
    assert run(tiny_api, **greedy(60, repetition_penalty=1.0, min_p=1.0, top_p=1.0))["output_ids"] == plain


def test_narrow_sampling_is_greedy(tiny_api: Api) -> None:
    best = run(tiny_api, **greedy(12))["output_ids"]
    for params in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-7}):
        assert run(tiny_api, **sampled(12, **params))["output_ids"] == best
    top = tiny_api.generate(text=PROMPT, return_logprob=True, top_logprobs_num=4, sampling_params=sampled(30, top_k=4))
    for token, entries in zip(top["output_ids"], top["meta_info"]["output_top_logprobs"], strict=True):
        assert token in [entry[1] for entry in entries]


def test_seeds_alone_and_in_a_crowd(tiny_api: Api) -> None:
    def seeded(seed: int, text: str = PROMPT) -> str:
        return str(run(tiny_api, text, **sampled(24, sampling_seed=seed))["text"])

    seeds = [0, 1, 2, -1, 2**63 - 1, -(2**63)]
    alone = [seeded(seed) for seed in seeds]
    assert len(set(alone)) == len(seeds)
    tiny_api.flush()
    with ThreadPoolExecutor(24) as pool:
        crowd = [pool.submit(seeded, seed) for seed in seeds]
        company = [pool.submit(seeded, number, f"{number} company") for number in range(18)]
        again = [future.result() for future in crowd]
        assert len({future.result() for future in company}) == 18
    assert again == alone
    free = [run(tiny_api, **sampled(24))["text"] for _ in range(3)]
    assert len(set(free)) == 3


def test_greedy_alone_streamed_batched_cached(tiny_api: Api) -> None:
    tiny_api.flush()
    prompts = [f"{PROMPT} number {i}" for i in range(6)]
    alone = [run(tiny_api, prompt, **greedy(20))["output_ids"] for prompt in prompts]
    assert [run(tiny_api, prompt, **greedy(20))["output_ids"] for prompt in prompts] == alone
    batch = tiny_api.generate(text=prompts, sampling_params=greedy(20))
    assert [answer["output_ids"] for answer in batch] == alone
    for prompt, ids in zip(prompts, alone, strict=True):
        assert tiny_api.stream(text=prompt, sampling_params=greedy(20))[-1]["output_ids"] == ids
