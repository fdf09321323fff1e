"""What ranks settle among themselves while a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from engine.parallel import group
from engine.parallel.group import DeviceGroup

if TYPE_CHECKING:
    from engine.kernels._cpu import Exchange
    from engine.parallel.distributed import Carrier


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of weights, and of one token in the KV pool: of a rank, or of several together; and what was free
    where they are, on their host or on the rank's GPU."""

    weight_bytes: int
    token_bytes: int
    available: int


class Company(Protocol):
    """The other ranks, while a model is loaded. place: this rank's number among those of its host, and how many these
    are."""

    @property
    def place(self) -> tuple[int, int]: ...

    def join(self, part: int) -> Exchange | None:
        """What parts of `part` bytes are exchanged by, on CPUs; None where there is nobody else. Raises ConfigError."""
        ...

    def meet(self, carrier: Carrier) -> DeviceGroup:
        """The group of ranks that have a GPU each, this process's current device. Raises ConfigError and
        GroupLostError."""
        ...

    def settle(self, own: Needs, size: Callable[[Needs], int], *, apart: bool = False) -> tuple[int, Needs]:
        """The slots of the KV pool, as rank 0 finds them from what the ranks of each memory need together (`size`), and
        what all need. apart: each rank has a memory of its own, else those of a host share one.

        Raises ConfigError where rank 0's `size` does.
        """
        ...


@dataclass(frozen=True)
class Alone:
    place: tuple[int, int] = (0, 1)

    def join(self, part: int) -> None:
        return None

    def meet(self, carrier: Carrier) -> DeviceGroup:
        return group.ALONE

    def settle(self, own: Needs, size: Callable[[Needs], int], *, apart: bool = False) -> tuple[int, Needs]:
        return size(own), own


ALONE = Alone()
