"""What the ranks of a host settle among themselves while a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from engine.kernels._cpu import Exchange


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of weights, and of one token in the KV pool: of a rank, or of all of them together."""

    weight_bytes: int
    token_bytes: int


class Company(Protocol):
    """The other ranks of this host, while a model is loaded."""

    def join(self, part: int) -> Exchange | None:
        """What parts of `part` bytes are exchanged by; None where there is nobody else. Raises ConfigError."""
        ...

    def settle(self, own: Needs, size: Callable[[Needs], int]) -> tuple[int, Needs]:
        """The slots of the KV pool, as rank 0 finds them from what all need together (`size`), and what that is.

        Raises ConfigError where rank 0's `size` does.
        """
        ...


@dataclass(frozen=True)
class Alone:
    def join(self, part: int) -> None:
        return None

    def settle(self, own: Needs, size: Callable[[Needs], int]) -> tuple[int, Needs]:
        return size(own), own


ALONE = Alone()
