"""Weight updates on their way: one at a time, the long parts of each in a thread beside the loop.

waiting ──► preparing ──► draining ──► copying ──► ended
            steps go on   nothing new   no steps
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.wire.to_frontend import ExpertsRecorded, Failed
from engine.wire.weights import ReadWeights, UpdateWeights, WeightRows
from scheduler_proc.control_failures import failed_question
from scheduler_proc.weights import Prepared, RefusedUpdateError, Weights

logger = logging.getLogger(__name__)

Phase = Literal["waiting", "preparing", "draining", "copying"]


@dataclass(frozen=True)
class Outcome:
    """An update that is over. refusal: why the old weights still serve, for the client; None: the new ones do."""

    update: UpdateWeights
    refusal: str | None


@dataclass(slots=True)
class WeightUpdates:
    """queue: the updates that have not ended; the first of them is the one that is in `phase`.

    reads, later: what is to be answered once nobody writes to the weights; of `later` the key, and what answers it.
    """

    weights: Weights
    queue: list[UpdateWeights] = field(default_factory=list)
    phase: Phase = "waiting"
    reads: list[ReadWeights] = field(default_factory=list)
    later: list[tuple[int, Callable[[], ExpertsRecorded]]] = field(default_factory=list)
    _prepared: Prepared | None = None
    _job: Future[Any] | None = None
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "weight update"))

    def advance(self, may_copy: Callable[[], bool]) -> Outcome | None:
        """Take the next step of the first update, if it is due. The update, when that has ended it.

        may_copy: whether no request would see both the old weights and the new. Raises WeightsLostError.
        """
        try:
            match self.phase:
                case "waiting" if self.queue:
                    update = self.queue[0]
                    self._start("preparing", self.weights.prepare, update.model_path, update.load_format)
                case "preparing" if self._done():
                    self._prepared = self._result()
                    self.phase = "draining"
        except RefusedUpdateError as error:
            return self._end(str(error))
        except Exception as error:  # nothing has been written yet: the old weights serve on
            logger.exception("A weight update could not be prepared")
            return self._end(f"internal error: {type(error).__name__}: {error}")
        if self.phase == "draining" and may_copy():
            self._start("copying", self.weights.replace, self._prepared)
        elif self.phase == "copying" and self._done():
            try:
                self._result()
            except RefusedUpdateError as error:
                return self._end(str(error))
            return self._end(None)
        return None

    def read(self) -> list[WeightRows | ExpertsRecorded | Failed]:
        """The answers to `reads` and `later`; none while weights are copied."""
        if self.phase == "copying" or not (self.reads or self.later):
            return []
        reads, self.reads = self.reads, []
        later, self.later = self.later, []
        return [*(self._rows(read) for read in reads), *(_answered(key, answer) for key, answer in later)]

    def _rows(self, read: ReadWeights) -> WeightRows | Failed:
        try:
            return WeightRows(read.key, self.weights.rows(read.name, read.rows))
        except Exception as error:
            logger.exception("Tensor %r cannot be read", read.name)
            return failed_question(read.key, error)

    def wait(self, seconds: float) -> None:
        """Until the thread has finished what it does, at most `seconds`. Its errors are left to `advance`."""
        if self._job is not None:
            self._job.exception(seconds)

    def _start(self, phase: Phase, work: Callable[..., Any], *arguments: Any) -> None:
        self._job = self._thread.submit(work, *arguments)
        self.phase = phase

    def _done(self) -> bool:
        return self._job is not None and self._job.done()

    def _result(self) -> Any:
        assert self._job is not None
        job, self._job = self._job, None
        return job.result()

    def _end(self, refusal: str | None) -> Outcome:
        self.phase, self._prepared = "waiting", None
        return Outcome(self.queue.pop(0), refusal)


def _answered(key: int, answer: Callable[[], ExpertsRecorded]) -> ExpertsRecorded | Failed:
    try:
        return answer()
    except Exception as error:
        logger.exception("A question that has waited for new weights failed")
        return failed_question(key, error)
