"""Whether steps may be computed, and with which weights: pauses, weight updates, versions."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from engine.config.run import ModelSource, Served, note_served
from engine.wire.to_frontend import ExpertsRecorded
from engine.wire.weights import (
    ContinueGeneration,
    Paused,
    PauseGeneration,
    ReadWeights,
    SetWeightVersion,
    UpdateWeights,
    WeightControl,
    WeightsUpdated,
)
from scheduler_proc.answers import Sender
from scheduler_proc.planner import Planner
from scheduler_proc.request import Request
from scheduler_proc.weight_updates import Outcome, WeightUpdates

logger = logging.getLogger(__name__)

UPDATED = "Succeeded to update model weights."
NOT_FLUSHED = (
    "Weights were updated, but the cache was not flushed because requests are still running or queued. "
    "Retract or finish them, then call /flush_cache."
)


@dataclass(slots=True)
class Generation:
    """requests: all of the scheduler's. updates: None where there are no weights to be updated.

    paused_at: time.monotonic() of the pause that generation is in, None when it is in none.
    """

    planner: Planner
    requests: Mapping[int, Request]
    outbox: Sender
    weight_version: str
    updates: WeightUpdates | None = None
    paused_at: float | None = None

    @property
    def paused(self) -> bool:
        return self.paused_at is not None

    @property
    def updating(self) -> bool:
        """Whether a weight update has not ended yet."""
        return self.updates is not None and bool(self.updates.queue)

    @property
    def halted(self) -> bool:
        """Whether no step may be computed now."""
        return self.paused or (self.updates is not None and self.updates.phase == "copying")

    def handle(self, message: WeightControl) -> None:
        match message:
            case UpdateWeights():
                logger.info("The weights are to be updated to those of %s", message.model_path)
                self._updates().queue.append(message)
            case ReadWeights():
                self._updates().reads.append(message)
            case SetWeightVersion(key, version):
                self.weight_version = version
                self._note(None)
                self._tell(key, f"Weight version updated to {version}")
            case PauseGeneration(key, mode):
                self._pause(mode)
                self.outbox.send(Paused(key, True))
            case ContinueGeneration(key):
                self._continue()
                self.outbox.send(Paused(key, False))

    def update_weights(self) -> None:
        """Bring the weight update that is under way, if one is, as far as it can come between two steps.

        Raises WeightsLostError.
        """
        updates = self.updates
        if updates is None:
            return
        if updates.queue:
            outcome = updates.advance(lambda: self.paused or not self._any_begun())
            # Who has begun ends with the weights it began with, and so nobody may begin now.
            self.planner.hold = updates.phase == "draining"
            if outcome is not None:
                self._end(outcome)
        for answer in updates.read():
            self.outbox.send(answer)

    def answer(self, key: int, answer: Callable[[], ExpertsRecorded], *, asks_ranks: bool) -> None:
        """Answer the question `key` at once; but if the other ranks are asked, and they read new weights just now, when
        they have: nobody else is to wait for that."""
        if asks_ranks and self.updates is not None and self.updates.phase == "copying":
            self.updates.later.append((key, answer))
        else:
            self.outbox.send(answer())

    def set_paused(self, paused: bool) -> None:
        """Pause or go on as a scheduler before this one did."""
        if paused and self.paused_at is None:
            self._pause("in_place")
        elif not paused:
            self._continue()

    def _note(self, source: ModelSource | None) -> None:
        """Note what serves from now on, before anybody hears of it: a scheduler after this one begins with it."""
        if self.updates is None:
            return
        weights = self.updates.weights
        if source is not None:
            weights.moved = source
        if weights.launch.runtime_dir:
            served = Served(source=weights.moved, weight_version=self.weight_version)
            try:
                note_served(weights.launch.runtime_dir, served)
            except OSError:
                logger.exception("What serves cannot be noted: a scheduler after this one begins with other weights")

    def _updates(self) -> WeightUpdates:
        assert self.updates is not None, "this scheduler has no weights to update"
        return self.updates

    def _any_begun(self) -> bool:
        return any(request.begun for request in self.requests.values())

    def _pause(self, mode: str) -> None:
        """The scheduler has ended all requests before, where these are to be aborted."""
        if mode == "retract":
            for request in list(self.planner.running):
                self.planner.preempt(request)
        if self.paused_at is None:
            self.paused_at = time.monotonic()
        logger.info("Generation paused (%s): %d requests wait", mode, len(self.requests))

    def _continue(self) -> None:
        if self.paused_at is None:
            return
        now = time.monotonic()
        for request in self.requests.values():  # the time of the pause counts against nobody's limit
            request.arrived_at += now - max(self.paused_at, request.arrived_at)
            if request.started_at is not None:
                request.started_at += now - max(self.paused_at, request.started_at)
        logger.info("Generation continued after %.1f s", now - self.paused_at)
        self.paused_at = None

    def _end(self, outcome: Outcome) -> None:
        """Answer an update; after one that took place, flush the cache and note what is in force."""
        update = outcome.update
        if outcome.refusal is not None:
            logger.error("Weights were not updated: %s", outcome.refusal)
            self._tell(update.key, outcome.refusal, success=False)
            return
        message = UPDATED
        if update.flush_cache and self.planner.running:
            message = NOT_FLUSHED
        elif update.flush_cache:
            self.planner.memory.flush()
        if update.weight_version is not None:
            self.weight_version = update.weight_version
            message += f" Weight version updated to {update.weight_version}."
        assert self.updates is not None
        self._note(self.updates.weights.serving.source)
        if update.keep_pause and self.paused_at is None:
            self.paused_at = time.monotonic()
        self._tell(update.key, message, model_path=update.model_path)

    def _tell(self, key: int, message: str, *, success: bool = True, model_path: str | None = None) -> None:
        self.outbox.send(
            WeightsUpdated(
                key=key, success=success, message=message, weight_version=self.weight_version, model_path=model_path,
                paused=self.paused,
            )
        )  # fmt: skip
