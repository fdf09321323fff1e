"""Signals as bytes on a socket, so that one loop can wait for them beside everything else."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextlib.contextmanager
def caught_signals() -> Iterator[socket.socket]:
    """While it lasts, STOP_SIGNALS and SIGCHLD do nothing but put their numbers on the socket, a byte each.

    A SIGHUP that is ignored (nohup) stays so.
    """
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        numbers = [*STOP_SIGNALS, signal.SIGCHLD]
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            numbers.remove(signal.SIGHUP)
        before = {number: signal.signal(number, lambda *_: None) for number in numbers}
        descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(descriptor)
            for number, handler in before.items():
                signal.signal(number, handler)


def arrived(reader: socket.socket) -> list[signal.Signals]:
    """The signals that have come since the last call."""
    try:
        return [signal.Signals(number) for number in reader.recv(4096)]
    except BlockingIOError:
        return []
