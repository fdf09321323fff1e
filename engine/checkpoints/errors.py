"""What can be wrong with a checkpoint."""

from __future__ import annotations

from typing import Literal


class CheckpointError(ValueError):
    """A model that cannot be found, read or served. The message names the path and what is wrong with it."""


Lack = Literal["repository not found", "revision not found", "invalid repository id"]


class NotFoundError(CheckpointError):
    """A name that names nothing. `lack` says what there is not, in the words of the contract (§3.5)."""

    def __init__(self, message: str, lack: Lack) -> None:
        super().__init__(message)
        self.lack = lack
