"""What a GPU's errors mean to those who asked for a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.parallel.group import GroupLostError


class DeviceLostError(GroupLostError):
    """The GPU has failed, and nothing more can be computed on it by this process."""


@contextmanager
def device_errors() -> Iterator[None]:
    """Raises MemoryError where the GPU's memory did not suffice: a smaller step may be tried. After any other error of
    the device CUDA refuses all further work in the process, so it is a DeviceLostError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error)) from error
    except torch.AcceleratorError as error:
        raise DeviceLostError(f"the GPU has failed: {error}") from error
