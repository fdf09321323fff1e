"""The memory in which the ranks of one host exchange parts: it has no name that could be left behind."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from engine.config import ConfigError
from engine.kernels import _cpu

_PAGE = 4096
_ARRIVAL = 128
_SLOTS = 2


@dataclass(slots=True)
class Memory:
    """Of an exchange, as long as others are to open it. path: where they do."""

    path: str
    _descriptor: int | None
    _named: Path | None

    def forget(self) -> None:
        """All have opened it: it goes with the last of them."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        if self._named is not None:
            self._named.unlink(missing_ok=True)
        self._descriptor = self._named = None


def make_exchange(ranks: int, part: int, patience: float, folder: Path) -> tuple[_cpu.SharedExchange, Memory]:
    """Rank 0's view of new memory, for parts of `part` bytes.

    It is a nameless file of the system's memory (memfd) where there are such, which needs no room in /dev/shm, and is
    gone when the last process has ended, however that ends; else a file in `folder` until `Memory.forget`. Raises
    ConfigError where there is no room.
    """
    try:
        if not hasattr(os, "memfd_create"):
            named = folder / "exchange"
            named.unlink(missing_ok=True)
            return _cpu.SharedExchange(str(named), 0, ranks, part, patience, True), Memory(str(named), None, named)
        descriptor = os.memfd_create("tokenmill exchange", os.MFD_CLOEXEC)
        os.posix_fallocate(descriptor, 0, _size(ranks, part))
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        return _cpu.SharedExchange(path, 0, ranks, part, patience, False), Memory(path, descriptor, None)
    except OSError as error:
        raise ConfigError(
            f"--tp-size {ranks}: {_size(ranks, part) / 1e6:.0f} MB of shared memory cannot be had ({error}); "
            "a smaller --chunked-prefill-size needs less"
        ) from None


def join_exchange(path: str, rank: int, ranks: int, part: int, patience: float) -> _cpu.SharedExchange:
    """Another rank's view. Raises OSError."""
    return _cpu.SharedExchange(path, rank, ranks, part, patience, False)


def _size(ranks: int, part: int) -> int:
    """As `SharedExchange` lays it out: who has arrived, then two parts a rank."""
    return _whole_pages(ranks * _ARRIVAL) + _SLOTS * ranks * _whole_pages(part)


def _whole_pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE
