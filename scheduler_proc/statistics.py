"""Throughput figures of the step loop, and the log lines made of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from scheduler_proc.planner import Extend, Planner

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Statistics:
    """Counts since the last log line; one line every `interval` steps that decode, one for each that prefills.

    throughput: output tokens per second of computing over the last interval; idle times in it do not count.
    """

    interval: int
    throughput: float = 0.0
    _steps: int = 0
    _tokens: int = 0
    _seconds: float = 0.0

    def step(self, plan: list[Extend], sampled: int, seconds: float, planner: Planner) -> None:
        """Count one step that took `seconds` and made `sampled` tokens."""
        prefill = sum(step.count for step in plan if step.count > 1)
        if prefill:
            logger.debug(
                "Prefill: %d tokens of %d requests in %.1f ms, running %d, waiting %d",
                prefill, len(plan), 1000 * seconds, len(planner.running), len(planner.waiting),
            )  # fmt: skip
        self._tokens += sampled
        self._seconds += seconds
        self._steps += 1
        if self._steps >= self.interval:
            self.throughput = self._tokens / max(self._seconds, 1e-9)
            usage = planner.memory.usage()
            logger.info(
                "Decode: running %d, waiting %d, %.1f tok/s, KV use %.1f%% + cached %.1f%%",
                len(planner.running), len(planner.waiting), self.throughput,
                100 * usage.used / usage.size, 100 * (usage.size - usage.used - usage.free) / usage.size,
            )  # fmt: skip
            self._steps = self._tokens = 0
            self._seconds = 0.0
