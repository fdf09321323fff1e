"""Messages that no process of this release sends: each fails by itself, and says what is wrong."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from simulation import VOCABULARY, admit, change_settings, expected_tokens, run_to_end, simulated_scheduler

from engine.wire.operation import Profile, Profiled, SlowDown
from engine.wire.sampling import LogprobOptions
from engine.wire.to_frontend import Failed
from engine.wire.to_scheduler import Admit
from scheduler_proc.profiler import Profiler

BROKEN: list[tuple[str, Admit]] = [
    ("input_ids must have at least 1 token, got 0", admit(1, [])),
    ("input_ids must be int32, got 3 bytes", msgspec.structs.replace(admit(1, [3]), input_ids=b"abc")),
    (f"input_ids must lie in [0, {VOCABULARY}), got -1 to 3", admit(1, [3, -1])),
    (f"output_ids must lie in [0, {VOCABULARY}), got {VOCABULARY}", admit(1, [3], earlier=[VOCABULARY])),
    ("input_ids and output_ids may have", admit(1, [3] * 9, earlier=[4] * 60)),
    ("top_p must be in (0, 1], got nan", admit(1, [3], top_p=math.nan)),
    ("temperature must be at least 0 and finite, got inf", admit(1, [3], temperature=math.inf)),
    ("max_new_tokens must be at least 0, got -7", admit(1, [3], new=-7)),
    (f"logit_bias must lie in [0, {VOCABULARY}), got -1", admit(1, [3], logit_bias={"-1": 1.0})),
    (f"logprobs.ids must lie in [0, {VOCABULARY}), got 50", admit(1, [3], logprobs=LogprobOptions(ids=[50]))),
    ("logprobs.top must be at least 0, got -2", admit(1, [3], logprobs=LogprobOptions(top=-2))),
]


@pytest.mark.parametrize(("message", "broken"), BROKEN, ids=[message for message, _ in BROKEN])
def test_an_admission_that_makes_no_sense_ends_with_500(message: str, broken: Admit) -> None:
    scheduler, sent, _ = simulated_scheduler(64)
    change_settings(scheduler, vocab_size=VOCABULARY)
    scheduler.handle(broken)
    scheduler.handle(admit(2, [3, 1, 4], new=4))
    run_to_end(scheduler)
    finish = sent.finishes[1]
    assert finish.status == 500 and finish.message is not None and message in finish.message
    assert sent.tokens[2] == expected_tokens([3, 1, 4], 4)


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf, 61.0])
def test_a_sleep_that_cannot_be_is_not_slept(seconds: float, caplog: pytest.LogCaptureFixture) -> None:
    scheduler, sent, _ = simulated_scheduler(64)
    scheduler.handle(SlowDown(seconds))
    assert "SlowDown failed" in caplog.text and scheduler.operation.pause == 0
    scheduler.handle(admit(1, [3], new=2))
    run_to_end(scheduler)
    assert sent.tokens[1] == expected_tokens([3], 2)


def test_every_profile_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, sent, _ = simulated_scheduler(64)
    start = Profile(key=1, action="start", folder="a\0b", name="trace")
    scheduler.handle(start)
    scheduler.turn()
    assert sent.others.pop() == Profiled(1, r"output_dir: 'a\x00b' cannot be made: embedded null byte")

    def fail(self: Profiler, message: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(Profiler, "handle", fail)
    scheduler.handle(start)
    assert sent.others.pop() == Failed(1, "internal error: RuntimeError: broken")
