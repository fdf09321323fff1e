"""How often processes may die, and when a dead one is started again."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

AGAIN = 10.0
"""A program that dies within so many seconds of its last death is not started again at once."""
FIRST_DELAY = 0.5
LONGEST_DELAY = 5.0


@dataclass
class Restarts:
    """At most `most` deaths within `window` seconds are survived, whichever processes they are of."""

    most: int
    window: float
    _deaths: deque[float] = field(default_factory=deque)
    _last: dict[str, tuple[float, float]] = field(default_factory=dict)

    def after_death(self, program: str, now: float) -> float | None:
        """Note a death; seconds until the program is to be started again, None when there were too many."""
        self._deaths.append(now)
        while self._deaths[0] <= now - self.window:
            self._deaths.popleft()
        if len(self._deaths) > self.most:
            return None
        died, delay = self._last.get(program, (float("-inf"), 0.0))
        delay = 0.0 if now - died > AGAIN + delay else min(max(FIRST_DELAY, 2 * delay), LONGEST_DELAY)
        self._last[program] = now, delay
        return delay
