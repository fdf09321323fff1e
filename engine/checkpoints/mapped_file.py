"""A memory-mapped file whose pages are given back once they have been used."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch

from engine.checkpoints.errors import CheckpointError


class MappedFile:
    """The bytes of a file as torch tensors that share its pages.

    Pages that were read count as the process's memory until `forget`; they stay in the system's cache all the same.
    """

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError when the file cannot be read."""
        try:
            with path.open("rb") as file:
                # Private and writable, as torch has no read-only tensors; nothing is ever written.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be mapped: {error}") from None
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def bytes_at(self, offset: int, size: int) -> torch.Tensor:
        """uint8 [size], sharing the file's pages. The caller has checked that the range lies within the file."""
        return self._bytes[offset : offset + size]

    def forget(self, offset: int, size: int) -> None:
        """Give back the pages that lie wholly within a range. Reading them again is right, only slower."""
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (offset + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)


def as_floats(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes [..., n] as numbers [..., n / size of one]: the same memory, or a copy where a writer did not align it."""
    return (data.clone() if data.storage_offset() % dtype.itemsize else data).view(dtype)
