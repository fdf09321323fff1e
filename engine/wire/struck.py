"""Who sent the signal that ended a process: its own mistake, or somebody from outside.

A signal of FAULTS that a process earns by a mistake (a bad address, say) kills it even where the signal is blocked. One
that is sent to it then waits for whoever asks for it, and names its sender. So the launcher starts its children with
these signals blocked, and each of them has a thread that asks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from engine.wire.board import Board

FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
OWN = FAULTS | {signal.SIGABRT, signal.SIGSYS, signal.SIGTRAP}
"""What a process dies of by its own doing; other signals come from outside."""


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Whatever is started meanwhile by this thread begins with FAULTS blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FAULTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def watch(board: Board) -> None:
    """Have this process note on the board if it is killed by a signal of FAULTS that another process sends; it does
    nothing where they are not blocked. Processes that this one starts begin with them blocked as well."""
    if signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= FAULTS and hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_wait, args=(board,), name="struck", daemon=True).start()


def _wait(board: Board) -> None:
    found = signal.sigwaitinfo(FAULTS)
    if found.si_pid != os.getpid():
        board.struck = os.getpid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FAULTS)
    signal.raise_signal(found.si_signo)
