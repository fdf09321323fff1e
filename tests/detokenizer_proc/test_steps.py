"""Steps: columns in, columns out, state freed, one bad request harming no other."""

from __future__ import annotations

import functools
import itertools
import random
import time
from typing import Any

import pytest

from detokenizer_proc.__main__ import handle
from detokenizer_proc.replies import detokenized
from detokenizer_proc.request import RequestText
from detokenizer_proc.steps import StepDecoder
from engine.checkpoints.tokenizer import Tokenizer, decode, encode
from engine.checkpoints.tokenizer_data import finish_tokenizer
from engine.wire.results import Finish, InputLogprobs, TokenLogprobs
from engine.wire.sampling import TextOptions
from engine.wire.to_detokenizer import NO_TOKEN, Detokenize, Opened, StepOutput
from engine.wire.to_frontend import TextStep
from engine.wire.to_scheduler import StopSeen
from tests.tokenizer_models import byte_level


class Sent(list[Any]):
    def send(self, message: Any) -> None:
        self.append(message)


@functools.cache
def tokenizer() -> Tokenizer:
    return finish_tokenizer(byte_level(), named_tokens={"bos_token": "<s>", "eos_token": "</s>"})


def opened(key: int, attempt: int = 0, **changes: object) -> Opened:
    fields: dict[str, object] = {
        "prompt_tokens": 2,
        "cached_tokens": 0,
        "prompt_tail": encode(tokenizer(), "The"),
        "output_ids": [],
        "text_options": TextOptions(),
        "input_logprobs": None,
    }
    return Opened(key=key, attempt=attempt, **{**fields, **changes})  # type: ignore[arg-type]


def step(rows: list[tuple[int, int]], open_: list[Opened] | None = None, **changes: object) -> StepOutput:
    """rows: (key, token), attempt 0 for all unless given."""
    fields: dict[str, object] = {
        "attempts": [0] * len(rows), "finished": {}, "logprobs": {}, "retracted": {},
    }  # fmt: skip
    keys, tokens = [key for key, _ in rows], [token for _, token in rows]
    return StepOutput(opened=open_ or [], keys=keys, tokens=tokens, **{**fields, **changes})  # type: ignore[arg-type]


def shown(decoder: StepDecoder, message: StepOutput) -> TextStep:
    result, _ = decoder.decode(message)
    assert result is not None
    return result


def test_many_requests_at_once_each_get_their_own_text() -> None:
    rng = random.Random(5)
    texts = ["Hello world", "日本語のテキスト 🙂", "naïve café", "def add(a, b):\n    return"] * 5
    ids = [encode(tokenizer(), text, add_special_tokens=False) for text in texts]
    decoder = StepDecoder(tokenizer())
    got = ["" for _ in texts]
    at = [0] * len(texts)
    while any(at[k] < len(ids[k]) for k in range(len(ids))):
        rows = [k for k in range(len(ids)) if at[k] < len(ids[k]) and rng.random() < 0.7]
        rng.shuffle(rows)
        first = [opened(k) for k in rows if at[k] == 0]
        ends = {r: Finish("length", length=1) for r, k in enumerate(rows) if at[k] == len(ids[k]) - 1}
        result, ended = decoder.decode(step([(k, ids[k][at[k]]) for k in rows], first, finished=ends))
        assert ended == []
        if rows:
            assert result is not None and result.finished == ends and result.keys == rows
            for key, text in zip(result.keys, result.texts, strict=True):
                got[key] += text
        for k in rows:
            at[k] += 1
    assert got == texts
    assert decoder.num_requests == 0


def test_a_stop_string_ends_the_request_here_and_late_rows_are_dropped() -> None:
    decoder = StepDecoder(tokenizer())
    ids = encode(tokenizer(), "END of it", add_special_tokens=False)
    options = TextOptions(stop=["D"])
    rows = [(key, ids[0]) for key in (1, 2)]
    result, ended = decoder.decode(step(rows, [opened(1, text_options=options), opened(2)]))
    keys_ended = list(ended)
    for token in ids[1:]:
        result, ended = decoder.decode(step([(1, token), (2, token)], logprobs={1: TokenLogprobs(-1.0)}))
        keys_ended += ended
        assert result is not None
        if 1 in keys_ended and not ended:
            assert result.keys == [2] and result.logprobs == {0: TokenLogprobs(-1.0)}
    assert keys_ended == [1]
    assert decoder.decode(step([(1, 5)])) == (None, [])
    assert decoder.num_requests == 1


def test_rows_of_an_older_attempt_are_dropped() -> None:
    decoder = StepDecoder(tokenizer())
    token = encode(tokenizer(), "a", add_special_tokens=False)[0]
    shown(decoder, step([(1, token)], [opened(1)]))
    resumed = opened(1, attempt=1, output_ids=[token])
    assert shown(decoder, step([(1, token)], [resumed], attempts=[1])).texts == ["a"]
    assert decoder.decode(step([(1, token)])) == (None, [])
    assert shown(decoder, step([(1, token)], attempts=[1])).texts == ["a"]


def test_resuming_inside_a_character() -> None:
    decoder = StepDecoder(tokenizer())
    spelled = [tokenizer().backend.token_to_id(c) for c in "ðŁ¦Ħ"]
    result = shown(decoder, step([(1, spelled[3])], [opened(1, output_ids=spelled[:3])]))
    assert result.texts == [bytes([0xF0, 0x9F, 0xA6, 0x84]).decode()]
    cut = shown(decoder, step([(2, spelled[0])], [opened(2)], finished={0: Finish("length", length=1)}))
    assert cut.texts == ["\ufffd"]


def test_texts_of_logprobs_are_each_id_by_itself() -> None:
    decoder = StepDecoder(tokenizer())
    a, b, c = (tokenizer().backend.token_to_id(text) for text in ("a", "Ġthe", "</s>"))
    options = TextOptions(text_in_logprobs=True)
    prompt = InputLogprobs(tokens=[(None, a), (-1.0, b)], top=[None, [(-0.5, c)]], ids=[None, [(-2.0, 10**6)]])
    scored = TokenLogprobs(-1.0, top=[(-1.0, a), (-2.0, c)], ids=[(-3.0, b)])
    message = step([(1, a), (2, b)], [opened(1, text_options=options, input_logprobs=prompt), opened(2)])
    result = shown(
        decoder, StepOutput(*[getattr(message, f) for f in message.__struct_fields__[:5]], {0: scored, 1: scored}, {})
    )
    texts = {token: decode(tokenizer(), [token], skip_special_tokens=False) for token in (a, b, c)}
    assert texts == {a: "a", b: " the", c: "</s>"}
    assert result.begun[0].texts == {**texts, 10**6: ""}
    assert result.begun[1].texts is None
    assert result.logprob_texts == {0: texts}


def test_a_failure_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    advance = RequestText.advance

    def failing(self: RequestText, token: int, finish: Finish | None) -> tuple[str, Finish | None]:
        if self.key == 1:
            raise RuntimeError("broken")
        return advance(self, token, finish)

    monkeypatch.setattr(RequestText, "advance", failing)
    decoder = StepDecoder(tokenizer())
    options = TextOptions(stop=["zz"])
    a = tokenizer().backend.token_to_id("a")
    result, ended = decoder.decode(step([(1, a), (2, a)], [opened(k, text_options=options) for k in (1, 2)]))
    assert result is not None and result.texts == ["", "a"] and ended == [1]
    assert result.finished[0].status == 500 and "broken" in str(result.finished[0].message)
    assert "RuntimeError: broken" in caplog.text


def test_a_pattern_that_does_not_compile_ends_its_request_alone() -> None:
    decoder = StepDecoder(tokenizer())
    a = tokenizer().backend.token_to_id("a")
    bad = opened(1, text_options=TextOptions(stop_regex=["("]))
    result, ended = decoder.decode(step([(1, a), (2, a)], [bad, opened(2)]))
    assert result is not None and result.texts == ["", "a"] and ended == [1]
    assert result.finished[0].status == 500


def test_a_pattern_that_takes_too_long_in_all_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = StepDecoder(tokenizer())
    a = tokenizer().backend.token_to_id("a")
    clock = itertools.count()
    monkeypatch.setattr(time, "process_time", lambda: next(clock) / 100)
    slow = opened(1, text_options=TextOptions(stop_regex=["never"]))
    result, ended = decoder.decode(step([(1, a), (2, a)], [slow, opened(2)]))
    for _ in range(30):
        if not ended:
            result, ended = decoder.decode(step([(1, a), (2, a)]))
    assert result is not None and result.texts == ["a", "a"] and ended == [1] and list(result.finished) == [0]
    assert result.finished[0].status == 400 and "for all patterns took over" in (result.finished[0].message or "")
    assert shown(decoder, step([(2, a)])).texts == ["a"]


def test_a_request_for_no_tokens_ends_without_text() -> None:
    decoder = StepDecoder(tokenizer())
    none = Finish("length", length=0)
    message = step([(1, NO_TOKEN)], [opened(1, text_options=TextOptions(stop=["a"]))], finished={0: none})
    result = shown(decoder, message)
    assert (result.texts, result.tokens, result.finished) == ([""], [NO_TOKEN], {0: none})
    assert decoder.num_requests == 0


def test_without_a_tokenizer_there_is_no_text() -> None:
    decoder = StepDecoder(None)
    result = shown(decoder, step([(1, 3)], [opened(1, prompt_tail=[1])], finished={0: Finish("stop", matched=3)}))
    assert (result.texts, result.tokens) == ([""], [3])
    assert detokenized(Detokenize(4, [[1]], True), None, 10).error is not None


@pytest.mark.parametrize("wrong", [-1, 421, 2**40, -(2**70)])
def test_detokenize_refuses_ids_out_of_vocabulary(wrong: int) -> None:
    reply = detokenized(Detokenize(4, [[1], [5, wrong]], True), tokenizer(), 421)
    assert reply.bad_ids and reply.error is not None and str(wrong) in reply.error and "421" in reply.error


def test_detokenize_gives_back_the_text() -> None:
    ids = [encode(tokenizer(), text, add_special_tokens=True) for text in ("Hello 日本", "")]
    assert detokenized(Detokenize(4, [*ids, []], True), tokenizer(), 421).texts == ["Hello 日本", "", ""]
    assert detokenized(Detokenize(4, ids[:1], False), tokenizer(), 421).texts == ["<s>Hello 日本"]


@pytest.mark.parametrize(
    "broken",
    [
        {"attempts": []},
        {"attempts": [0, 0, 0]},
        {"finished": {2: Finish("length", length=1)}},
        {"finished": {-1: Finish("stop")}},
    ],
)
def test_a_step_whose_columns_do_not_fit_ends_the_requests_it_names(broken: dict[str, object]) -> None:
    decoder = StepDecoder(tokenizer())
    decoder.decode(step([(1, 40), (2, 41), (3, 42)], [opened(1), opened(2), opened(3)]))
    frontend, scheduler = Sent(), Sent()
    message = step([(1, 43), (2, 44)], **broken)
    handle(message, decoder, tokenizer(), 300, frontend, scheduler)
    assert [(one.key, one.attempt, one.finish.status) for one in frontend] == [(1, 0, 500), (2, 0, 500)]
    assert scheduler == [StopSeen([1, 2], [0, 0])]
    assert decoder.num_requests == 1
    assert shown(decoder, step([(3, 42)])).keys == [3]
