"""What can be wrong with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal


class CheckpointError(ValueError):
    """A model that cannot be found, read or served. The message names the path and what is wrong with it."""


Lack = Literal["repository not found", "revision not found", "invalid repository id"]


class NotFoundError(CheckpointError):
    """A name that names nothing. `lack` says what there is not, in the words of the contract (§3.5)."""

    def __init__(self, message: str, lack: Lack) -> None:
        super().__init__(message)
        self.lack = lack


@contextmanager
def makes_sense(path: str | Path) -> Iterator[None]:
    """What the reading of `path` trips over without having foreseen it comes as a CheckpointError too: whatever a file
    holds, it is the file that is to blame, and a server that runs goes on. A MemoryError says nothing of the file."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of packages in Rust
            raise
        raise CheckpointError(f"{path}: makes no sense: {type(error).__name__}: {error}") from error
