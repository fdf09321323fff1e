"""A tokenizer that fails costs one request its answer; what comes behind it passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_tokenizer_process import VOCAB, generate, tokenize

from engine.checkpoints.tokenizer import load_tokenizer
from engine.wire.sampling import Sampling
from engine.wire.to_frontend import Accepted, Ended
from engine.wire.to_scheduler import Abort, QueryState
from engine.wire.to_tokenizer import Embed, Judge
from tests.process_ends import running
from tests.tokenizer_models import byte_level, source, write_folder
from tokenizer_proc import admission, embedding, judging, replies
from tokenizer_proc.admission import admit
from tokenizer_proc.replies import tokenized
from tokenizer_proc.validation import Bounds

BOUNDS = Bounds(
    vocab_size=VOCAB, context_length=64, auto_truncate=False, max_new_tokens_limit=None, has_tokenizer=True, segments=0
)


class PanicException(BaseException):
    """As packages written in Rust raise it: no Exception."""


def test_a_request_that_springs_a_fault_and_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [
        {"where": "tokenize", "token": 17, "what": "raise"},
        {"where": "tokenize", "token": 18, "what": "memory"},
    ]
    monkeypatch.setenv("TOKENMILL_FAULTS", json.dumps(faults))
    with running("tokenizer_proc", "tokenizer", source(write_folder(tmp_path, byte_level())), VOCAB) as (ends, _):
        for message in (generate(1, ids=[5]), generate(2, ids=[5, 17]), Abort([9]), generate(3, ids=[18])):
            ends.send(message)
        ends.send(QueryState(4))
        ends.send(generate(5, ids=[6]))
        got = [ends.take("frontend") for _ in range(4)]
        assert isinstance(got[0], Accepted) and isinstance(got[3], Accepted)
        for ended, words in ((got[1], "InjectedFaultError: injected"), (got[2], "MemoryError: injected")):
            assert isinstance(ended, Ended) and ended.finish.status == 500
            assert f"Internal error while admitting request r{ended.key}: {words}" in str(ended.finish.message)
        passed = [ends.take("scheduler") for _ in range(4)]
        assert passed[0].key == 1 and passed[1:3] == [Abort([9]), QueryState(4)] and passed[3].key == 5


@pytest.mark.parametrize("error", [RuntimeError("odd text"), RecursionError("deep"), PanicException("a panic")])
def test_whatever_a_tokenizer_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    tokenizer = load_tokenizer(source(write_folder(tmp_path, byte_level())))

    def failing(*_: Any, **__: Any) -> Any:
        raise error

    for module, name in ((admission, "encode"), (embedding, "encode_pair"), (judging, "encode"), (replies, "encode")):
        monkeypatch.setattr(module, name, failing)
    embed = Embed(key=2, attempt=0, rid="r2", text="x", pair=None, input_ids=None)
    judge = Judge(key=3, attempt=0, rid="r3", query="q", document="d", instruct=None)
    for message, statuses in ((generate(1, "x"), {500}), (embed, {400, 500}), (judge, {500})):
        ended = admit(message, tokenizer, BOUNDS)
        assert isinstance(ended, Ended) and ended.finish.status in statuses and str(error) in str(ended.finish.message)
        if ended.finish.status == 500:
            assert message.rid in str(ended.finish.message) and f"Request {message.rid} failed" in caplog.text
    assert str(error) in str(tokenized(tokenize(4, prompts=["x"]), tokenizer, 64).error)


def test_a_call_to_stop_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopping(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(admission, "check_ids", stopping)
    with pytest.raises(KeyboardInterrupt):
        admit(generate(1, ids=[5], sampling=Sampling()), None, BOUNDS)
