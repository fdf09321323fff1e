"""What is answered to a control message that the scheduler has failed to carry out."""

from __future__ import annotations

from collections.abc import Sequence

from engine.wire.operation import Profile, Profiled
from engine.wire.to_detokenizer import ToDetokenizer
from engine.wire.to_frontend import ExpertsRecorded, Flushed, State
from engine.wire.to_scheduler import FlushCache, QueryState, RecordExperts, ToScheduler
from engine.wire.weights import (
    ContinueGeneration,
    Paused,
    PauseGeneration,
    ReadWeights,
    SetWeightVersion,
    UpdateWeights,
    WeightRows,
    WeightsUpdated,
)


def failed_answers(
    message: ToScheduler, error: Exception, *, weight_version: str, paused: bool
) -> Sequence[ToDetokenizer]:
    """The answers, of which messages that nobody waits for have none. weight_version, paused: what is in force."""
    words = f"internal error: {type(error).__name__}: {error}"
    match message:
        case FlushCache(key):
            return [Flushed(key, False)]
        case QueryState(key):
            return [State(key, {"error": words})]
        case RecordExperts(key):
            return [ExpertsRecorded(key, words)]
        case UpdateWeights(key=key) | SetWeightVersion(key):
            return [
                WeightsUpdated(
                    key=key, success=False, message=words, weight_version=weight_version, model_path=None, paused=paused
                )
            ]
        case Profile(key=key):
            return [Profiled(key, words)]
        case ReadWeights(key):
            return [WeightRows(key, None)]
        case PauseGeneration(key) | ContinueGeneration(key):
            return [Paused(key, paused)]
        case _:
            return []
