"""Throughput figures of the step loop, the log lines made of them, and the counts that load routes and metrics show."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from scheduler_proc.planner import Extend, Planner

logger = logging.getLogger(__name__)

STEP_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds in seconds of the histogram of steps; one more bucket takes the rest."""
HIT_REQUESTS = 128
"""The cache hit rate is that of so many requests, the last ones that began."""


@dataclass(slots=True)
class Statistics:
    """Counts since the last log line; one line every `interval` steps that decode, one for each that prefills.

    throughput: output tokens per second of computing over the last interval; idle times in it do not count.
    hits: (tokens from the cache, prompt tokens) of the last requests that began.
    steps, step_buckets, step_seconds, prefilled, decoded: since the start, the last two in tokens.
    """

    interval: int
    throughput: float = 0.0
    hits: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=HIT_REQUESTS))
    steps: int = 0
    step_buckets: list[int] = field(default_factory=lambda: [0] * (len(STEP_BOUNDS) + 1))
    step_seconds: float = 0.0
    prefilled: int = 0
    decoded: int = 0
    _steps: int = 0
    _tokens: int = 0
    _seconds: float = 0.0

    def begin(self, plan: list[Extend]) -> None:
        """Count the requests of a step, which is not computed yet, that begin with it."""
        for step in plan:
            request = step.request
            # Nothing is computed of it beyond what it found in the cache.
            if request.computed == request.cached_tokens and not request.retractions:
                self.hits.append((request.cached_tokens, request.prompt_length))

    def step(self, plan: list[Extend], sampled: int, seconds: float, planner: Planner) -> None:
        """Count one step that took `seconds` and made `sampled` tokens."""
        prefill = sum(step.count for step in plan if step.count > 1)
        if prefill:
            logger.debug(
                "Prefill: %d tokens of %d requests in %.1f ms, running %d, waiting %d",
                prefill, len(plan), 1000 * seconds, len(planner.running), len(planner.waiting),
            )  # fmt: skip
        self.steps += 1
        self.step_buckets[bisect_left(STEP_BOUNDS, seconds)] += 1
        self.step_seconds += seconds
        self.prefilled += prefill
        self.decoded += sampled
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

    def report(self, planner: Planner) -> dict[str, Any]:
        """The part of the scheduler's state that load routes and metrics need beside its own."""
        prompts = sum(prompt for _, prompt in self.hits)
        return {
            "num_waiting_uncached_tokens": sum(request.outstanding for request in planner.waiting),
            "num_retracted_reqs": sum(request.retractions > 0 for request in planner.waiting),
            "cache_hit_rate": sum(cached for cached, _ in self.hits) / prompts if prompts else 0.0,
            "steps": self.steps,
            "step_bounds": STEP_BOUNDS,
            "step_buckets": self.step_buckets,
            "step_seconds": self.step_seconds,
            "prefill_tokens": self.prefilled,
            "decode_tokens": self.decoded,
        }
