"""A failure in the detokenizer ends its request with 500; the rest of the step passes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_steps import opened, shown, step, tokenizer

from detokenizer_proc import steps
from detokenizer_proc.incremental import StreamFactory
from detokenizer_proc.steps import StepDecoder
from engine.config import faults
from engine.wire.results import Finish, InputLogprobs, TokenLogprobs
from engine.wire.sampling import TextOptions
from engine.wire.to_detokenizer import StepOutput
from engine.wire.to_scheduler import StopSeen
from tests.process_ends import running
from tests.tokenizer_models import byte_level, source, write_folder


@pytest.fixture(autouse=True)
def unarmed() -> Iterator[None]:
    yield
    faults.arm(None)


def failing(*_: Any, **__: Any) -> Any:
    raise RuntimeError("broken")


def token(text: str) -> int:
    found: int = tokenizer().backend.token_to_id(text)
    return found


def test_the_text_before_cannot_be_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    good = StreamFactory.open
    monkeypatch.setattr(
        StreamFactory, "open", lambda self, tail, **more: failing() if 7 in tail else good(self, tail, **more)
    )
    decoder = StepDecoder(tokenizer())
    a = token("a")
    bad = opened(1, rid="r1", prompt_tail=[7], text_options=TextOptions(stop=["zz"]))
    result, ended = decoder.decode(step([(1, a), (2, a)], [bad, opened(2)]))
    assert result is not None and result.texts == ["", "a"] and ended == [1]
    message = "Internal error while decoding request r1: RuntimeError: broken"
    assert result.finished == {0: Finish("abort", message=message, status=500)}
    assert shown(decoder, step([(1, a), (2, a)])).keys == [2]
    assert decoder.num_requests == 1


@pytest.mark.parametrize("of_prompt", [True, False])
def test_the_texts_of_logprobs_fail(monkeypatch: pytest.MonkeyPatch, of_prompt: bool) -> None:
    """Of a request that goes on, and of one that the scheduler has ended with this very token."""
    a, b = token("a"), token("b")
    decoder = StepDecoder(tokenizer())
    options = TextOptions(text_in_logprobs=True)
    first = InputLogprobs([(None, b)]) if of_prompt else None
    requests = [
        opened(1, text_options=options, input_logprobs=first),
        opened(2, text_options=options),
        opened(3, text_options=options, input_logprobs=first),
    ]
    one, other = TokenLogprobs(-1.0), TokenLogprobs(-1.0, top=[(-1.0, b)])
    good = steps.decode
    monkeypatch.setattr(steps, "decode", lambda owner, ids, **more: failing() if b in ids else good(owner, ids, **more))
    logprobs = {0: one if of_prompt else other, 1: one, 2: one if of_prompt else other}
    finished = {2: Finish("length", length=1)}
    message = step([(1, a), (2, a), (3, a)], requests, logprobs=logprobs, finished=finished)
    result, ended = decoder.decode(message)
    assert result is not None and ended == [1] and result.finished.keys() == {0, 2}
    assert {finish.status for finish in result.finished.values()} == {500}
    assert result.texts[1] == "a" and result.logprob_texts[1] == {a: "a"} and decoder.num_requests == 1


def test_over_the_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = token("a"), token("b"), token("c")
    monkeypatch.setenv("TOKENMILL_FAULTS", json.dumps([{"where": "detokenize", "token": b, "what": "raise"}]))
    folder = write_folder(tmp_path, byte_level())
    with running("detokenizer_proc", "detokenizer", source(folder), 421) as (ends, _):
        requests = [opened(key, rid=f"r{key}", prompt_tail=[c]) for key in (1, 2, 3)]
        ends.send(StepOutput(requests, [1, 2, 3], [0] * 3, [a, a, a], {}, {}, {}))
        assert ends.take("frontend").texts == ["a"] * 3
        ends.send(StepOutput([], [1, 2, 3], [0] * 3, [a, b, c], {}, {}, {}))
        result = ends.take("frontend")
        assert result.texts == ["a", "", "c"] and result.finished.keys() == {1}
        assert "decoding request r2" in result.finished[1].message
        assert ends.take("scheduler") == StopSeen([2], [0])
