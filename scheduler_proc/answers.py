"""Answers to control questions, remembered for a while: who lost one on its way asks again, and nothing is done
twice."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

from engine.wire.operation import Profile, Profiled
from engine.wire.to_detokenizer import ToDetokenizer
from engine.wire.to_frontend import ExpertsRecorded, Failed, Flushed
from engine.wire.to_scheduler import FlushCache, RecordExperts, ToScheduler
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

Question = (
    FlushCache | RecordExperts | UpdateWeights | SetWeightVersion | ReadWeights | PauseGeneration | ContinueGeneration
    | Profile
)  # fmt: skip
Answer = Flushed | ExpertsRecorded | WeightsUpdated | WeightRows | Paused | Profiled | Failed

REMEMBERED = 32


class Sender(Protocol):
    def send(self, message: ToDetokenizer) -> None: ...


class Answers:
    """Stands before the outbox of the scheduler."""

    def __init__(self, outbox: Sender) -> None:
        self._outbox = outbox
        self._asked: set[int] = set()
        self._answered: OrderedDict[int, Answer] = OrderedDict()

    def send(self, message: ToDetokenizer) -> None:
        if isinstance(message, Answer):
            self._asked.discard(message.key)
            self._answered[message.key] = message
            if len(self._answered) > REMEMBERED:
                self._answered.popitem(last=False)
        self._outbox.send(message)

    def known(self, message: ToScheduler) -> bool:
        """Whether `message` is a question that was asked before: it is answered again, or will be in any case."""
        if not isinstance(message, Question):
            return False
        answer = self._answered.get(message.key)
        if answer is not None:
            self._outbox.send(answer)
            return True
        if message.key in self._asked:
            return True
        self._asked.add(message.key)
        return False
