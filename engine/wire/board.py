"""The board: a few numbers in a mapped file of the runtime folder, which outlive the process that wrote them.

Each process writes there, from its own loop, when that last turned: a loop that hangs stops doing so. It also writes
there whom it has in hand: the scheduler whom it has on trial (`scheduler_proc/trials.py`), the tokenizer and the
detokenizer whose text they are about to read or make. One that dies of it has so named the culprit. And the scheduler
writes there which requests run: those that wait are not the first to be suspected.
"""

from __future__ import annotations

import mmap
import os
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

BEATS = 1.0
"""Seconds between two beats of a process that has nothing to do."""

_SLOTS = (
    "scheduler", "tokenizer", "detokenizer", "frontend", "keys", "struck", "running", "waiting",
    "scheduler's hand", "tokenizer's hand", "detokenizer's hand",
)  # fmt: skip
_WORKERS = 64
"""Slot of worker 0, which there is not: rank 0 is the scheduler."""
_COMPUTED = 256
"""Slot of how many keys of requests that run stand in the slots behind it; _NOT_KNOWN: nobody can tell."""
_MOST_COMPUTED = 4095
_NOT_KNOWN = -1
_SIZE = 8 * (_COMPUTED + 1 + _MOST_COMPUTED)


def _slot(process: str) -> int:
    if process.startswith("worker"):
        return _WORKERS + int(process.removeprefix("worker"))
    return _SLOTS.index(process)


class Board:
    """One process's view of it.

    keys: below this number lie all keys that frontends before this one can have given. struck: pid of the process that
    somebody else's signal has ended (`engine/wire/struck.py`), 0 for none.
    """

    def __init__(self, runtime_dir: str) -> None:
        descriptor = os.open(Path(runtime_dir) / "board", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, _SIZE)
            self._map = mmap.mmap(descriptor, _SIZE)
        finally:
            os.close(descriptor)
        self._slots = memoryview(self._map).cast("q")

    def beat(self, process: str) -> None:
        """The loop of `process` has turned."""
        self._slots[_slot(process)] = time.monotonic_ns()

    def last_beat(self, process: str) -> float | None:
        """In seconds of time.monotonic(); None while it has not beaten since `silence`."""
        beat = self._slots[_slot(process)]
        return beat / 1e9 if beat else None

    def silence(self, process: str) -> None:
        """Forget the beats of a process that is gone."""
        self._slots[_slot(process)] = 0

    def hold(self, process: str, key: int) -> None:
        """What `process` does next concerns the request, or the question, `key` alone; 0: no single one."""
        self._slots[_SLOTS.index(process + "'s hand")] = key

    def held(self, process: str) -> int:
        """The key that `process` has in hand; 0 for none."""
        return self._slots[_SLOTS.index(process + "'s hand")]

    def note_computed(self, keys: Sequence[int]) -> None:
        """The scheduler computes the requests `keys` from now on. Should it die in here, that is not known."""
        self._slots[_COMPUTED] = _NOT_KNOWN
        if len(keys) <= _MOST_COMPUTED:
            self._slots[_COMPUTED + 1 : _COMPUTED + 1 + len(keys)] = memoryview(array("q", keys))
            self._slots[_COMPUTED] = len(keys)

    def take_computed(self) -> list[int] | None:
        """The requests that the scheduler was computing, which are forgotten; None where that is not known."""
        count = self._slots[_COMPUTED]
        keys = None if count == _NOT_KNOWN else self._slots[_COMPUTED + 1 : _COMPUTED + 1 + count].tolist()
        self._slots[_COMPUTED] = 0
        return keys

    def note_load(self, running: int, waiting: int) -> None:
        """How many requests the scheduler computes, and how many wait."""
        self._slots[_SLOTS.index("running")] = running
        self._slots[_SLOTS.index("waiting")] = waiting

    @property
    def load(self) -> tuple[int, int]:
        """Requests that run and that wait, as the scheduler has last said."""
        return self._slots[_SLOTS.index("running")], self._slots[_SLOTS.index("waiting")]

    @property
    def struck(self) -> int:
        return self._slots[_SLOTS.index("struck")]

    @struck.setter
    def struck(self, pid: int) -> None:
        self._slots[_SLOTS.index("struck")] = pid

    @property
    def keys(self) -> int:
        return self._slots[_SLOTS.index("keys")]

    @keys.setter
    def keys(self, key: int) -> None:
        self._slots[_SLOTS.index("keys")] = key

    def close(self) -> None:
        self._slots.release()
        self._map.close()


class Heart:
    """Beats for one process. also: called with each beat."""

    __slots__ = ("_process", "also", "board")

    def __init__(self, runtime_dir: str, process: str) -> None:
        self.board = Board(runtime_dir)
        self.also: Callable[[], None] | None = None
        self._process = process
        self.beat()

    def beat(self) -> None:
        self.board.beat(self._process)
        if self.also is not None:
            self.also()
