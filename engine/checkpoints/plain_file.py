"""A file whose bytes are read by calls, not through mapped pages."""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path
from typing import Protocol

import torch

from engine.checkpoints.errors import CheckpointError


class WeightFile(Protocol):
    """What a reader of weights needs of a file."""

    def bytes_at(self, offset: int, size: int) -> torch.Tensor:
        """uint8 [size], perhaps only until the next call; the range was within the file when it was opened. Never to be
        written to."""
        ...

    def forget(self, offset: int, size: int) -> None:
        """The range has been used, and need not stay in memory."""
        ...


class PlainFile:
    """The bytes of a file, copied into a buffer that each thread has of its own and uses again and again.

    Slower than a `MappedFile`, but a file that somebody cuts short meanwhile, or a disk that fails, is an error
    here: of mapped pages it would be a signal that ends the process.
    """

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError when the file cannot be read."""
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        weakref.finalize(self, os.close, self._descriptor)
        self._buffers = threading.local()

    def bytes_at(self, offset: int, size: int) -> torch.Tensor:
        """uint8 [size], valid until this thread asks for others. Raises CheckpointError for bytes that are not there or
        cannot be read."""
        data = self._buffer(size)
        view = data.numpy().data
        done = 0
        while done < size:
            try:
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self._path}: cannot be read at byte {offset + done}: {error.strerror}"
                ) from None
            if count == 0:
                raise CheckpointError(f"{self._path}: ends at byte {offset + done}; it was longer when it was opened")
            done += count
        return data

    def forget(self, offset: int, size: int) -> None:
        """Nothing: the buffer is used again anyway."""

    def _buffer(self, size: int) -> torch.Tensor:
        buffer: torch.Tensor | None = getattr(self._buffers, "bytes", None)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers.bytes = torch.empty(size, dtype=torch.uint8)
        return buffer[:size]
