"""The private folder of one launch: its sockets and its configuration file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from engine.launcher.errors import LaunchError

_PREFIX = "tokenmill-"
_LONGEST_SOCKET_NAME = "detokenizer.sock"
_SOCKET_PATH_LIMIT = 103
"""Bytes that a Unix socket's path may have on every system (Linux allows four more)."""


@contextlib.contextmanager
def runtime_dir() -> Iterator[Path]:
    """A new folder of mode 0700, removed at the end.

    It lies in $XDG_RUNTIME_DIR, or in the folder of temporary files where that is unset, not writable or too long for
    the path of a socket. A launcher holds a lock in its folder; folders of launchers that were killed are removed here.
    Raises LaunchError when no place is to be had.
    """
    parent = _parent()
    _remove_abandoned(parent)
    folder, lock = _locked_folder(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _parent() -> Path:
    candidates = [Path(name) for name in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp") if name]
    for parent in candidates:
        path = parent / (_PREFIX + "x" * 8) / _LONGEST_SOCKET_NAME
        if len(os.fsencode(path)) <= _SOCKET_PATH_LIMIT and os.access(parent, os.W_OK | os.X_OK):
            return parent
    raise LaunchError(
        f"no folder for sockets: {', '.join(map(str, candidates))}: not writable, or too long for a socket's path"
    )


def _locked_folder(parent: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "lock").exists():
            return folder, lock
        os.close(lock)  # another launcher took the lock in between and removed the folder as abandoned


def _remove_abandoned(parent: Path) -> None:
    for lock_file in parent.glob(f"{_PREFIX}*/lock"):
        with contextlib.suppress(OSError):  # another user's folder, or one that another launcher is removing
            lock = os.open(lock_file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_uid == os.getuid():
                    shutil.rmtree(lock_file.parent)
            finally:
                os.close(lock)
