"""What the planner asks of the memory for keys and values, whether that keeps them (`kv_memory`) or not
(`step_memory`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import msgspec

from scheduler_proc.request import Request


class Usage(msgspec.Struct, frozen=True):
    """Tokens: of the whole memory, held by running requests, cached and free."""

    size: int
    used: int
    cached: int
    free: int


class Memory(Protocol):
    """Slots for the keys and values of tokens. reuse: prefixes of earlier requests are kept for later ones."""

    reuse: bool

    @property
    def available(self) -> int:
        """Slots that running requests can still get."""
        ...

    def usage(self) -> Usage: ...

    def begin_step(self) -> None:
        """A new step is planned."""
        ...

    def attach(self, request: Request) -> None:
        """Give a request the cached prefix it may reuse."""
        ...

    def detach(self, request: Request) -> None:
        """Undo `attach` of a request that is not admitted after all."""
        ...

    def cached_length(self, request: Request) -> int:
        """How many tokens of a request's prompt `attach` would find."""
        ...

    def extend(self, request: Request, count: int) -> bool:
        """Give a request slots for its next `count` tokens. False, and nothing done, when there is no room."""
        ...

    def withdraw(self, request: Request, start: int, count: int) -> None:
        """Take back what `extend` gave for `count` of its tokens, from the `start`th on: they were not computed."""
        ...

    def store(self, request: Request) -> None:
        """Keep what a request has computed for others."""
        ...

    def release(self, request: Request) -> None:
        """Let go of everything a request holds."""
        ...

    def flush(self) -> None:
        """Forget what is kept. Raises RuntimeError while a request uses it."""
        ...

    def check(self, running: Iterable[Request]) -> None:
        """Raise `InvariantError` unless every slot is accounted for."""
        ...
