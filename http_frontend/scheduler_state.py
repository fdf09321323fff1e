"""The scheduler's newest state, for routes that must answer quickly whatever the load."""

from __future__ import annotations

import asyncio
import time
from math import isfinite
from typing import Any

from engine.wire.to_frontend import State
from http_frontend.ring import Ring

_INTERVAL = 1.0
"""Seconds between two questions, however many ask."""


class StateWatch:
    """state: as it was `age` seconds ago; empty until there is one."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._asked = float("-inf")
        self._came = float("-inf")
        self._news = asyncio.Event()
        self.state: dict[str, Any] = {}

    @property
    def age(self) -> float:
        """Seconds since the state came; infinite before the first."""
        return time.perf_counter() - self._came

    def take(self, message: State) -> None:
        """A state has come, whoever has asked for it. Raises ValueError of one whose numbers are none."""
        for name, value in message.state.items():
            if name.startswith(("num_", "last_gen_")) and not (isinstance(value, int | float) and isfinite(value)):
                raise ValueError(f"the scheduler's {name} must be a number, got {value!r}")
        self.state = message.state
        self._came = time.perf_counter()
        self._news.set()

    async def newest(self, patience: float) -> dict[str, Any]:
        """The state, asked for anew if the last question is a second old; waits `patience` seconds at most, and has
        what there is then."""
        now = time.perf_counter()
        if now - self._asked >= _INTERVAL:
            self._asked = now
            self._news.clear()
            self._ring.nudge()
        if self._came < self._asked:
            try:
                async with asyncio.timeout(patience):
                    await self._news.wait()
            except TimeoutError:
                pass
        return self.state
