"""What the launcher tells the service manager that has started it: systemd's notify protocol, sd_notify(3)."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import MutableMapping
from dataclasses import dataclass

from engine.launcher.errors import LaunchError

log = logging.getLogger(__name__)

LOADING_EXTENSION = 60.0
"""Seconds that a start which makes progress may take from now on, whatever TimeoutStartSec says."""
LOADING_LOOK = 10.0
"""Seconds between two looks at whether it does."""
LOAD_EVERY = 5.0
"""Seconds between two statuses of how many requests there are."""
_IDLE_SECONDS = 0.05
"""Processor time between two looks that is no progress; the look itself takes a part of it."""
_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


@dataclass
class Notifier:
    """address: of the manager's socket; None: nobody listens, and every call does nothing.

    beat_every: seconds between two beats of the watchdog; None: it is off.
    """

    address: str | None = None
    beat_every: float | None = None
    _last_beat: float = float("-inf")
    _failed: bool = False
    _told: str = ""
    _told_at: float = float("-inf")
    _loaded: threading.Event | None = None

    def send(self, **fields: str | int) -> None:
        """Send `NAME=value` lines in one datagram. A manager that cannot be reached is logged once, and served on."""
        if self.address is None:
            return
        name = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        text = "\n".join(f"{field}={' '.join(str(value).splitlines())}" for field, value in fields.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(1.0)
                sender.connect(name)
                sender.sendall(text.encode())
        except OSError as error:
            if not self._failed:
                log.warning("the service manager at NOTIFY_SOCKET %s cannot be told: %s", self.address, error)
            self._failed = True

    def status(self, text: str) -> None:
        """What `systemctl status` shows."""
        self._told = text
        self.send(STATUS=text)

    def load(self, text: str) -> None:
        """A status that changes all the time: told when it is another one, and not too often."""
        now = time.monotonic()
        if text != self._told and now >= self._told_at + LOAD_EVERY:
            self._told, self._told_at = text, now
            self.status(text)

    def loading(self, text: str) -> None:
        """Until `ready` or `stopping`, the start gets more time as long as this process and its children work.

        A large model may have to be downloaded and then read: nobody knows beforehand how long that takes. A tree that
        uses no processor time does not get on, and is left to TimeoutStartSec.
        """
        self.status(text)
        if self.address is not None and self._loaded is None:
            self._loaded = threading.Event()
            threading.Thread(target=self._extend, args=(self._loaded,), name="notify", daemon=True).start()

    def ready(self, text: str) -> None:
        """The server is warm."""
        self._end_loading()
        self.send(READY=1, MAINPID=os.getpid(), STATUS=text)

    def stopping(self, text: str, seconds: float) -> None:
        """The server ends, within so many seconds, which it gets whatever TimeoutStopSec says."""
        self._end_loading()
        self.send(STOPPING=1, STATUS=text, EXTEND_TIMEOUT_USEC=round(seconds * 1e6))

    def beat(self, until: float | None = None) -> float | None:
        """Feed the watchdog if it is time; called in each turn of the loop that is to be watched.

        Returns when that loop has to turn again (of time.monotonic()): at the next beat, and not later than `until`.
        """
        if self.beat_every is None:
            return until
        now = time.monotonic()
        if now >= self._last_beat + self.beat_every:
            self._last_beat = now
            self.send(WATCHDOG=1)
        due = self._last_beat + self.beat_every
        return due if until is None else min(due, until)

    def _end_loading(self) -> None:
        if self._loaded is not None:
            self._loaded.set()

    def _extend(self, loaded: threading.Event) -> None:
        before = 0.0
        while not loaded.is_set():
            spent = _processor_seconds()
            if abs(spent - before) > _IDLE_SECONDS:
                self.send(EXTEND_TIMEOUT_USEC=round(LOADING_EXTENSION * 1e6))
            before = spent
            loaded.wait(LOADING_LOOK)


def take_notifier(environment: MutableMapping[str, str]) -> Notifier:
    """The notifier that `environment` (os.environ) describes, whose variables are removed: children are not to notify.

    Raises LaunchError for an address or a watchdog that cannot be.
    """
    address, usec, pid = (environment.pop(name, "") for name in _VARIABLES)
    if not address:
        return Notifier()
    if address[0] not in "/@" or len(address) < 2:
        raise LaunchError(f"NOTIFY_SOCKET: {address!r}: must be a path that begins with a slash, or an @name")
    if not usec or (pid and pid != str(os.getpid())):
        return Notifier(address)
    if not usec.isascii() or not usec.isdigit() or int(usec) == 0:
        raise LaunchError(f"WATCHDOG_USEC: {usec!r}: must be a whole number of microseconds, at least 1")
    return Notifier(address, int(usec) / 2e6)


def _processor_seconds() -> float:
    """That this process and all its living children have used so far."""
    import psutil  # only a launch that someone waits for pays for it

    spent = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has ended in between
            times = process.cpu_times()
            spent += times.user + times.system
    return spent
