"""What ranks say to one another while they compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class GroupLostError(RuntimeError):
    """Another rank is gone, or does not answer: what was being computed can no longer be."""


class Group(Protocol):
    """The ranks of one model. All of them make the same calls in the same order; each call waits for the others.

    Raises GroupLostError where one of them stays away.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x, in its dtype: added up in float32 and in the order of the ranks, so that an entry
        depends on nothing but what it is the sum of, and is the same bits everywhere. May overwrite x."""
        ...

    def gather(self, x: torch.Tensor) -> list[torch.Tensor] | None:
        """All ranks' x (contiguous, of shapes and dtypes that may differ), in the order of the ranks, for rank 0, where
        they are valid until the next call; None elsewhere."""
        ...


class DeviceGroup(Group, Protocol):
    """Ranks with a GPU each. Sums and `all_gather` are queued there, as kernels are."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' x, of one shape and dtype, on every rank: [size, *x.shape]."""
        ...


@dataclass(frozen=True)
class Alone:
    """The group of a model that is not divided."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x]

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x[None]


ALONE = Alone()


def in_order(parts: list[torch.Tensor]) -> torch.Tensor:
    """The sum of equal shapes and dtypes as `Group.all_reduce` defines it; parts[0] is left as it is."""
    total = parts[0].to(torch.float32)
    for part in parts[1:]:
        total = total + part
    return total.to(parts[0].dtype)
