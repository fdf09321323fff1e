"""What an operator asks of the running processes, on its way round the ring: log levels, profiles, a slow step."""

from __future__ import annotations

from typing import Literal

import msgspec

MOST_SLEEP = 60.0
"""Seconds that the scheduler may be made to sleep before each step."""


class Tune(msgspec.Struct, frozen=True, array_like=True, tag=True, kw_only=True):
    """For every process that it passes, in turn; nobody answers.

    log_level: of all loggers from now on; None: as it is. freeze_gc: what lives now is left alone by the collector.
    """

    log_level: str | None = None
    freeze_gc: bool = False


class SlowDown(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The scheduler sleeps `seconds` before each step from now on; 0.0: no more. Not answered."""

    seconds: float


class Profile(msgspec.Struct, frozen=True, array_like=True, tag=True, kw_only=True):
    """Start or stop recording where the time of steps goes; answered by `Profiled`.

    folder: where the trace is written. name: begins the file's name. num_steps: stop after so many steps, and answer
    only then. start_step: begin with this step of the process (None: with the next one).
    """

    key: int
    action: Literal["start", "stop"]
    folder: str = ""
    name: str = ""
    num_steps: int | None = None
    start_step: int | None = None


class Profiled(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Answer to `Profile`. error: why it could not be done. path: the file, where one has been written."""

    key: int
    error: str | None = None
    path: str | None = None


OperationControl = Tune | SlowDown | Profile
