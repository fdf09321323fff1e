"""A bar on stderr that says what a benchmark is doing, when a person watches."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class Progress:
    """Counts requests; shows nothing when nobody watches, or that is not wanted."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        shown = not quiet and sys.stderr.isatty()
        self._bar: Any = tqdm(total=total, unit="request", disable=not shown, file=sys.stderr, leave=False)

    def phase(self, name: str) -> None:
        """Say what happens now."""
        self._bar.set_description(name)

    def advance(self, count: int = 1) -> None:
        self._bar.update(count)

    def close(self) -> None:
        self._bar.close()
