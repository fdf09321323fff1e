"""What else ran on this machine while a benchmark measured: figures of a busy machine say little."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

import psutil

_BUSY = ("user", "nice", "system", "irq", "softirq")
_WORTH_SAYING = 0.1


class OtherProcesses:
    """Counts the CPU time of all processes but this one and `pids`, from now on."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._processes = [psutil.Process(pid) for pid in (os.getpid(), *pids)]
        self._before = self._others()
        self._began = time.monotonic()

    def note(self) -> str | None:
        """A line for the reader if they took more than a tenth of a core until now."""
        cores = (self._others() - self._before) / (time.monotonic() - self._began)
        if cores < _WORTH_SAYING:
            return None
        return (
            f"Other processes used {100 * cores:.0f} % of a core meanwhile; on an idle machine the figures are others."
        )

    def _others(self) -> float:
        every = psutil.cpu_times()
        busy = sum(getattr(every, name, 0.0) for name in _BUSY)
        return busy - sum(sum(process.cpu_times()[:2]) for process in self._processes)
