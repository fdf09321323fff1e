"""Whatever fails while the scheduler carries out a control message: the question is answered, and the loop goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from simulation import admit, expected_tokens, run_to_end, simulated_scheduler

from engine.wire.operation import Profile, SlowDown, Tune
from engine.wire.to_frontend import Failed
from engine.wire.to_scheduler import Abort, Control, FlushCache, QueryState, RecordExperts, StartOver, StopSeen
from engine.wire.weights import (
    ContinueGeneration,
    PauseGeneration,
    ReadWeights,
    SetWeightVersion,
    UpdateWeights,
    WeightsUpdated,
)
from scheduler_proc.recorder import Recorder, RecorderSettings
from scheduler_proc.runner import Runner
from scheduler_proc.weight_updates import WeightUpdates

PROMPT = [1, 2, 3]
TABLE: dict[type, tuple[Any, str]] = {
    StartOver: (StartOver(100, None), "_start_over"),
    Abort: (Abort([1]), "_abort"),
    StopSeen: (StopSeen([1], [0]), "admission.drop"),
    Tune: (Tune(log_level="info"), "operation.handle"),
    SlowDown: (SlowDown(0.5), "operation.handle"),
    FlushCache: (FlushCache(7, 0.0), "planner.memory.flush"),
    QueryState: (QueryState(7), "planner.memory.usage"),
    RecordExperts: (RecordExperts(7, "start"), "runner.recorder.start"),
    Profile: (Profile(key=7, action="stop"), "operation.profiler.handle"),
    UpdateWeights: (UpdateWeights(key=7, model_path="x"), "updates.weights.prepare"),
    SetWeightVersion: (SetWeightVersion(7, "v9"), "generation._note"),
    ReadWeights: (ReadWeights(7, "w", 1), "updates.weights.rows"),
    PauseGeneration: (PauseGeneration(7, "retract"), "generation._pause"),
    ContinueGeneration: (ContinueGeneration(7), "generation._continue"),
}
"""Of each kind a message, and what of the scheduler breaks while it is carried out."""
UNANSWERED = (StartOver, Abort, StopSeen, Tune, SlowDown)


class NoWeights:
    """Stands for the weights, of which nothing is ever read."""

    launch: Any = None
    prepare = rows = replace = None


def test_the_table_has_every_kind() -> None:
    assert set(TABLE) == {*get_args(Control), StopSeen}


@pytest.mark.parametrize("kind", TABLE, ids=lambda kind: kind.__name__)
def test_a_control_message_that_fails(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    message, place = TABLE[kind]
    scheduler, sent, _ = simulated_scheduler(300)
    scheduler.updates = scheduler.generation.updates = WeightUpdates(NoWeights())  # type: ignore[arg-type]
    scheduler.runner = scheduler.steps.runner = Runner(
        scheduler.runner.program, scheduler.backend, Recorder(RecorderSettings("stat", 9, Path(), (0,), 4))
    )

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        *path, name = place.split(".")
        owner: Any = scheduler
        for part in path:
            owner = getattr(owner, part)
        patch.setattr(type(owner), name, broken)
        scheduler.handle(message)
        scheduler.turn()
        if kind is UpdateWeights:
            scheduler.updates.wait(10)
            scheduler.turn()
    if kind is UpdateWeights:
        (told,) = sent.others
        assert isinstance(told, WeightsUpdated) and not told.success and "RuntimeError: broken" in told.message
    else:
        wanted = [] if kind in UNANSWERED else [Failed(7, "internal error: RuntimeError: broken")]
        assert sent.others == wanted
    sent.others.clear()
    scheduler.handle(admit(5, PROMPT))
    run_to_end(scheduler)
    assert sent.tokens[5] == expected_tokens(PROMPT, 8)
    assert not scheduler.generation.paused and not scheduler.generation.updating
