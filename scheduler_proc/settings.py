"""What the scheduler is told once, at its start."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.checkpoints.task import Task


class SchedulerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the loop.

    longest: most prompt + output tokens of a request (`max_req_len`); max_input: prompts must be shorter.
    max_queued, max_queued_tokens: requests, and prompt tokens, that may wait.
    waiting_timeout, running_timeout: seconds, None for no limit.
    strict: an invariant that does not hold ends the process (else it is logged).
    report: the part of `/server_info` that does not change.
    task: what the model is served for. vocab_size: token ids lie below it; None: not known.
    """

    eos_ids: list[int]
    longest: int
    max_input: int
    max_queued: int | None
    truncate: bool
    refuse_priority: bool
    original_logprobs: bool
    waiting_timeout: float | None
    running_timeout: float | None
    strict: bool
    report: dict[str, Any]
    task: Task = Task()
    max_queued_tokens: int | None = None
    vocab_size: int | None = None
