"""The tokenizer process, over its sockets."""

from __future__ import annotations

import os
import subprocess
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.config import ModelFacts, RunConfig, ServerConfig, write_run_config
from engine.wire.results import Finish
from engine.wire.sampling import LogprobOptions, Sampling, TextOptions
from engine.wire.to_frontend import Accepted, Ended, Tokenized
from engine.wire.to_scheduler import Abort, Admit, FlushCache, QueryState, RecordExperts
from engine.wire.to_tokenizer import Generate, Tokenize
from tests.process_ends import Ends, running
from tests.tokenizer_models import byte_level, source, write_folder

VOCAB = 421


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"), byte_level())


@pytest.fixture(scope="module")
def ends(folder: Path) -> Iterator[Ends]:
    with running("tokenizer_proc", "tokenizer", source(folder), VOCAB) as (ends, _):
        yield ends


def generate(key: int, text: str | None = None, ids: list[int] | None = None, **changes: Any) -> Generate:
    fields: dict[str, Any] = {
        "attempt": 3, "rid": f"r{key}", "output_ids": b"", "sampling": Sampling(seed=9), "text_options": TextOptions(),
        "logprobs": None, **changes,
    }  # fmt: skip
    packed = None if ids is None else array("i", ids).tobytes()
    return Generate(key=key, text=text, input_ids=packed, **fields)


def tokenize(key: int, **changes: Any) -> Tokenize:
    fields: dict[str, Any] = {
        "prompts": None, "add_special_tokens": True, "messages": None, "add_generation_prompt": False,
        "continue_final_message": False, "tools": None, "template_kwargs": {}, **changes,
    }  # fmt: skip
    return Tokenize(key=key, **fields)


def test_a_request_goes_to_the_scheduler_and_its_prompt_to_the_frontend(ends: Ends) -> None:
    message = generate(1, "Hello", extra_key="k", priority=4, logprobs=LogprobOptions(start=0, top=2))
    ends.send(message)
    accepted, admitted = ends.take("frontend"), ends.take("scheduler")
    assert isinstance(accepted, Accepted) and isinstance(admitted, Admit)
    assert (accepted.key, accepted.attempt, accepted.input_ids) == (1, 3, admitted.input_ids)
    assert array("i", admitted.input_ids)[0] == 1  # the BOS of the tokenizer
    for name in ("key", "attempt", "rid", "sampling", "text_options", "logprobs", "extra_key", "priority"):
        assert getattr(admitted, name) == getattr(message, name)


def test_nobody_waits_for_a_call_with_much_text(ends: Ends) -> None:
    long = ["Hello there " * 3000] * 60
    for key in (11, 12):
        ends.send(tokenize(key, prompts=[*long, "Hello"]))
    ends.send(tokenize(13, prompts=["Hello"]))
    ends.send(generate(14, "Hello"))
    assert isinstance(ends.take("scheduler"), Admit)
    answers = [ends.take("frontend") for _ in range(4)]
    assert [answer.key for answer in answers] == [13, 14, 11, 12]
    for answer in answers[2:]:
        assert [len(answer.ids), answer.ids[-1]] == [61, answers[0].ids[0]]
        assert answer.ids[0] == answer.ids[59] and len(answer.ids[0]) > 3000
        assert (answer.max_model_len, answer.error) == (answers[0].max_model_len, None)


def test_control_messages_keep_their_place(ends: Ends) -> None:
    controls = [Abort([7]), FlushCache(8, 1.5), QueryState(9), RecordExperts(10, "dump")]
    for control in controls:
        ends.send(generate(2, ids=[5]))
        ends.send(control)
    got = [ends.take("scheduler") for _ in range(8)]
    assert got[1::2] == controls and all(isinstance(message, Admit) for message in got[::2])
    for _ in range(4):
        assert isinstance(ends.take("frontend"), Accepted)


def test_refusals_end_the_request_and_nothing_else(ends: Ends) -> None:
    bad = [
        (generate(1, ids=[]), 400, "door", "input_ids cannot be empty."),
        (generate(2, ids=[5, VOCAB]), 400, "door", f"token id {VOCAB}; valid range is [0, {VOCAB})."),
        (generate(3, "x" * 4000), 400, "door", "longer than the model's context length (64 tokens)."),
        (generate(4, "x", sampling=Sampling(temperature=-1.0)), 400, "door", "temperature must be"),
        (generate(5, "x", text_options=TextOptions(stop_regex=["("])), 400, "door", "invalid stop_regex '(': "),
        (generate(6, ids=[5], logprobs=LogprobOptions(start=2)), 400, "scheduler", "req.logprob_start_len=2 is higher"),
        (generate(7, ids=[5], logprobs=LogprobOptions(top=10**6)), 400, "door", "top_logprobs_num must be in [0, 421]"),
        (msgspec.structs.replace(generate(8), input_ids=b"abc"), 500, "scheduler", "r8"),
    ]
    for message, status, origin, words in bad:
        ends.send(message)
        ended = ends.take("frontend")
        assert isinstance(ended, Ended) and (ended.key, ended.attempt, ended.origin) == (message.key, 3, origin)
        assert ended.finish == Finish("abort", message=ended.finish.message, status=status)
        assert words in str(ended.finish.message)
    ends.send(generate(9, "still there?"))
    assert isinstance(ends.take("frontend"), Accepted) and ends.take("scheduler").key == 9


def test_tokenize(ends: Ends) -> None:
    ends.send(tokenize(1, prompts=["Hello", ""]))
    reply = ends.take("frontend")
    assert isinstance(reply, Tokenized) and reply.error is None
    assert [ids[0] for ids in reply.ids] == [1, 1] and len(reply.ids[1]) == 1 and reply.max_model_len == 512
    ends.send(tokenize(2, prompts=["Hello"], add_special_tokens=False))
    assert ends.take("frontend").ids == [reply.ids[0][1:]]
    ends.send(tokenize(3, prompts=["<s>[user] Hello</s>\n[assistant]"], add_special_tokens=False))
    expected = ends.take("frontend").ids
    chat = {"messages": [{"role": "user", "content": "Hello"}], "add_generation_prompt": True}
    ends.send(tokenize(4, **chat))
    assert ends.take("frontend").ids == expected
    ends.send(tokenize(5, messages=[{"role": "user"}], continue_final_message=True))
    reply = ends.take("frontend")
    assert reply.ids == [] and "no content to continue" in reply.error


def test_without_a_tokenizer_only_ids_are_taken() -> None:
    with running("tokenizer_proc", "tokenizer", None, 10, skip_tokenizer_init=True) as (ends, _):
        ends.send(generate(1, ids=[9]))
        assert isinstance(ends.take("frontend"), Accepted) and ends.take("scheduler").key == 1
        ends.send(generate(2, "text"))
        assert "cannot accept text prompts" in ends.take("frontend").finish.message
        ends.send(generate(3, ids=[1], text_options=TextOptions(stop=["x"])))
        assert ends.take("frontend").finish.message == (
            "stop=['x'] is unavailable when skip_tokenizer_init=True (requires tokenizer to decode tokens to text for "
            "matching)."
        )
        ends.send(tokenize(4, prompts=["x"]))
        assert "skip-tokenizer-init" in ends.take("frontend").error


def test_a_tokenizer_that_cannot_be_loaded_is_said_in_one_line(tmp_path: Path) -> None:
    """The launcher shows a stranger the last lines of a process that failed to start."""
    (tmp_path / "tokenizer.json").write_text('{"model": 5}')
    config = RunConfig(
        server=ServerConfig(),
        model=source(tmp_path),
        tokenizer=source(tmp_path),
        facts=ModelFacts(architectures=[], model_type=None, vocab_size=9, context_length=9, eos_ids=[]),
        runtime_dir=str(tmp_path),
        launcher_pid=os.getpid(),
        launch_command="test",
        started_at=0.0,
    )
    write_run_config(config, tmp_path / "run.json")
    command = [sys.executable, "-m", "tokenizer_proc", "--config", str(tmp_path / "run.json")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: {tmp_path / 'tokenizer.json'}: is not a tokenizer: ")
    assert "Traceback" not in ended.stderr
