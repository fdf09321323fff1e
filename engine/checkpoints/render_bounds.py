"""Bounds on the rendering of a chat template: it comes from a stranger, and so may the messages that it is given."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

SECONDS = 5.0
MOST_MEMORY = 512 << 20
"""Bytes that rendering may add to the process."""
MOST_CHARACTERS = 16 << 20
"""Of the rendered text."""

_PAGE = resource.getpagesize()


class RenderLimitError(Exception):
    """A template has taken more than it may. Not an error that templates or their sandbox know."""


@contextlib.contextmanager
def bounded(seconds: float = SECONDS, memory: int = MOST_MEMORY) -> Iterator[None]:
    """Let the body take so much time (RenderLimitError) and so much more memory (MemoryError).

    A signal interrupts it, so that it has to run on the main thread, where these are handled; elsewhere only memory is
    bounded.
    """
    with _memory_bounded(memory):
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def interrupt(_number: int, _frame: FrameType | None) -> None:
            raise RenderLimitError(f"it took longer than {seconds:g} s")

        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _memory_bounded(memory: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        size = int(Path("/proc/self/statm").read_bytes().split()[0]) * _PAGE
    except FileNotFoundError:  # not Linux: no way to tell what there is
        yield
        return
    most = size + memory
    if soft != resource.RLIM_INFINITY:
        most = min(most, soft)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
