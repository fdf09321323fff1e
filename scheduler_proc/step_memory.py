"""Slots of a model that reads whole prompts: the rows of one step, handed out anew in each."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from scheduler_proc.memory import Usage
from scheduler_proc.request import Request


class StepMemory:
    """Room for the tokens of one step. Nothing is kept: a request that is planned ends with its step."""

    reuse = False

    def __init__(self, size: int) -> None:
        self.size = size
        self._next = 0

    @property
    def available(self) -> int:
        return self.size

    def usage(self) -> Usage:
        return Usage(self.size, 0, 0, self.size)

    def begin_step(self) -> None:
        self._next = 0

    def attach(self, request: Request) -> None:
        pass

    def detach(self, request: Request) -> None:
        pass

    def cached_length(self, request: Request) -> int:
        return 0

    def extend(self, request: Request, count: int) -> bool:
        end = self._next + count
        if end > self.size:
            return False
        request.slots[:count] = np.arange(self._next, end)
        self._next = end
        return True

    def withdraw(self, request: Request, start: int, count: int) -> None:
        pass

    def store(self, request: Request) -> None:
        pass

    def release(self, request: Request) -> None:
        request.computed = 0

    def flush(self) -> None:
        pass

    def check(self, running: Iterable[Request]) -> None:
        pass
