"""The detokenizer process, over its sockets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.checkpoints.tokenizer import encode, load_tokenizer
from engine.wire.results import Finish
from engine.wire.sampling import TextOptions
from engine.wire.to_detokenizer import Detokenize, Opened, StepOutput
from engine.wire.to_frontend import Detokenized, Ended, ExpertsRecorded, Flushed, State, TextStep, Vectors
from engine.wire.to_scheduler import StopSeen
from tests.process_ends import Ends, running
from tests.tokenizer_models import byte_level, source, write_folder

VOCAB = 421


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Ends, list[int]]]:
    folder = write_folder(tmp_path_factory.mktemp("model"), byte_level())
    ids = encode(load_tokenizer(source(folder)), "日本 and the END", add_special_tokens=False)
    with running("detokenizer_proc", "detokenizer", source(folder), VOCAB) as (ends, _):
        yield ends, ids


def test_tokens_become_text_until_a_stop_string(started: tuple[Ends, list[int]]) -> None:
    ends, ids = started
    texts = {1: "", 2: ""}
    finished: dict[int, Finish] = {}
    for number, token in enumerate(ids):
        opened = [
            Opened(1, 0, 1, 0, [5], [], TextOptions(stop=["END"]), None),
            Opened(2, 0, 1, 0, [5], [], TextOptions(), None),
        ]
        ends.send(StepOutput(opened if number == 0 else [], [1, 2], [0, 0], [token, token], {}, {}, {}))
        step = ends.take("frontend")
        assert isinstance(step, TextStep)
        assert [begun.key for begun in step.begun] == ([1, 2] if number == 0 else [])
        for key, text in zip(step.keys, step.texts, strict=True):
            texts[key] += text
        finished |= {step.keys[row]: finish for row, finish in step.finished.items()}
    assert texts == {1: "日本 and the ", 2: "日本 and the END"}
    assert finished == {1: Finish("stop", matched="END")}
    assert ends.take("scheduler") == StopSeen([1], [0])


def test_what_is_not_text_passes_in_order(started: tuple[Ends, list[int]]) -> None:
    ends, _ = started
    messages = [
        Ended(4, 0, Finish("abort", message="Abort in waiting queue"), "scheduler"),
        Vectors([7, 8], [0, 1], [3, 4], [1, 2], bytes(range(12)), {1: b"hidd"}, {8: 1}, "default"),
        Flushed(5, True),
        ExpertsRecorded(7, "no room"),
        State(6, {"a": [1, {"b": None}]}),
    ]
    for message in messages:
        ends.send(message)
    assert [ends.take("frontend") for _ in messages] == messages


def test_detokenize(started: tuple[Ends, list[int]]) -> None:
    ends, ids = started
    ends.send(Detokenize(7, [ids, []], True))
    assert ends.take("frontend") == Detokenized(7, ["日本 and the END", ""], None)
    ends.send(Detokenize(8, [[VOCAB]], True))
    assert ends.take("frontend").bad_ids
