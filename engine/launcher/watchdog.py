"""The watchdog: which process has not turned its loop for too long (`engine/wire/board.py`)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.launcher.children import Child
from engine.wire.board import Board

log = logging.getLogger(__name__)

FIRST_LOAD = 120.0
"""Seconds that a process may be silent, at least, while it loads what its program has not loaded before."""
LOADING_SHARE, LOADING_MARGIN, LOADING_MOST = 4.0, 5.0, 600.0
"""A process that loads may be silent for so many times as long as its program has taken to load before, and for so many
seconds more: imports beat no heart, and the system's cache may have become cold. But only for so many seconds: a load
may have taken long because it waited for another machine."""


@dataclass
class Watchdog:
    """timeout: seconds after which a process counts as hung. soft: after which it is only reported.

    loading: the longest that each program has taken to load.
    """

    board: Board
    timeout: float
    soft: float | None
    loading: dict[str, float] = field(default_factory=dict)
    _looked: float = field(default_factory=time.monotonic)
    _awake: float = 0.0
    _reported: set[int] = field(default_factory=set)

    @property
    def interval(self) -> float:
        """Seconds between two looks."""
        return min(max(min(self.timeout, self.soft or self.timeout) / 8, 0.05), 5.0)

    def note_loaded(self, child: Child) -> None:
        """`child` is ready."""
        name = child.program.name
        self.loading[name] = max(self.loading.get(name, 0.0), time.monotonic() - child.started)

    def hung(self, children: Iterable[Child], ready: Iterable[str]) -> list[Child]:
        """Those of `children` (which run) that count as hung. ready: names of those that have loaded."""
        now = time.monotonic()
        if now - self._looked > self.interval + 1.0:
            # This process was stopped itself, perhaps the whole tree with it: all get their time anew.
            self._awake = now
        self._looked = now
        return [child for child in children if self._is_hung(child, now, child.program.name in ready)]

    def _is_hung(self, child: Child, now: float, is_ready: bool) -> bool:
        beat = self.board.last_beat(child.program.name)
        silent = now - max(child.started if beat is None else beat, self._awake)
        patience = self.timeout
        if not is_ready:
            loading = self.loading.get(child.program.name)
            share = FIRST_LOAD if loading is None else LOADING_SHARE * loading + LOADING_MARGIN
            patience = max(patience, min(share, LOADING_MOST))
        pid = child.process.pid
        if silent > patience:
            log.error("%s (pid %d) has shown no sign of life for %.1f s: killing it", child.program.title, pid, silent)
            return True
        if self.soft is None or silent <= self.soft:
            self._reported.discard(pid)
        elif is_ready and pid not in self._reported:
            self._reported.add(pid)
            log.warning("%s (pid %d) has shown no sign of life for %.1f s", child.program.title, pid, silent)
        return False
