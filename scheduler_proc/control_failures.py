"""What is answered to a control message that the scheduler has failed to carry out."""

from __future__ import annotations

from engine.wire.operation import SlowDown, Tune
from engine.wire.to_frontend import Failed
from engine.wire.to_scheduler import Abort, Admit, StartOver, StopSeen, ToScheduler


def failed(message: ToScheduler, error: BaseException) -> Failed | None:
    """The answer; None to a message that nobody waits for."""
    if isinstance(message, Admit | StartOver | Abort | StopSeen | Tune | SlowDown):
        return None
    return failed_question(message.key, error)


def failed_question(key: int, error: BaseException) -> Failed:
    """The answer to the question `key`."""
    return Failed(key, f"internal error: {type(error).__name__}: {error}")
