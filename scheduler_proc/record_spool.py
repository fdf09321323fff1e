"""The record of experts beside the process: files of the runtime folder from which the next scheduler goes on.

Each step is appended to a file as it is recorded; what a process has written stays in the system's cache when it dies.
Where only the last steps are kept there are two files, of which the older goes when the newer holds enough.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

logger = logging.getLogger(__name__)

_LENGTH = 8
"""Bytes before each step that say how long it is."""


class SpooledStep(msgspec.Struct, frozen=True, array_like=True):
    """A step as it is written. columns: its arrays, as the recorder's mode has them."""

    number: int
    columns: list[bytes]


@dataclass(slots=True)
class Spool:
    """most: steps that are kept, the last ones; None: all. on: whether steps are being recorded.

    What cannot be written is logged once, and the record then dies with the process.
    """

    folder: Path
    most: int | None
    _file: int | None = None
    _count: int = 0
    _failed: bool = False

    @property
    def on(self) -> bool:
        return self._mark.exists()

    @on.setter
    def on(self, on: bool) -> None:
        with self._tried():
            if on:
                os.close(os.open(self._mark, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            else:
                self._mark.unlink(missing_ok=True)

    def read(self) -> Iterator[SpooledStep]:
        """The steps that are there, in order, as far as they are whole: the last one may not be."""
        for path in (self._older, self._newer):
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue
            start = self._count = 0
            while len(content) >= start + _LENGTH:
                end = start + _LENGTH + int.from_bytes(content[start : start + _LENGTH], "little")
                if end > len(content):
                    break
                yield msgspec.msgpack.decode(content[start + _LENGTH : end], type=SpooledStep)
                self._count += 1
                start = end
            with self._tried():
                os.truncate(path, start)
        if not self._newer.exists():
            self._count = 0

    def append(self, step: SpooledStep) -> None:
        if self._failed:
            return
        with self._tried():
            if self.most is not None and self._count >= self.most:
                self._close()
                self._newer.rename(self._older)
                self._count = 0
            if self._file is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._file = os.open(self._newer, flags, 0o600)
            body = msgspec.msgpack.encode(step)
            whole = memoryview(len(body).to_bytes(_LENGTH, "little") + body)
            while whole:
                whole = whole[os.write(self._file, whole) :]
            self._count += 1

    def clear(self) -> None:
        """Forget all steps."""
        self._close()
        self._count, self._failed = 0, False
        with self._tried():
            for path in (self._older, self._newer):
                path.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None

    @property
    def _mark(self) -> Path:
        return self.folder / "experts-on"

    @property
    def _older(self) -> Path:
        return self.folder / "experts-0"

    @property
    def _newer(self) -> Path:
        return self.folder / "experts-1"

    @contextlib.contextmanager
    def _tried(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._failed = True
            logger.warning("The record of experts is kept in memory alone, and dies with this process: %s", error)
