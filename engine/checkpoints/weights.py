"""Reading weights: tensor by tensor, from memory-mapped files, straight into their place and dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class WeightReader(Protocol):
    """The tensors of a checkpoint under their Hugging Face names, whatever file they lie in."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every tensor."""
        ...

    def read_into(self, name: str, destination: torch.Tensor) -> None:
        """Copy a tensor into `destination` (same shape), converting it to the dtype of `destination`."""
        ...


class Place(Protocol):
    """Where a tensor of a checkpoint belongs."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    def write(self, start: int, rows: torch.Tensor) -> None: ...


@dataclass(frozen=True, eq=False)
class TensorPlace:
    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def write(self, start: int, rows: torch.Tensor) -> None:
        self.tensor[start : start + len(rows)].copy_(rows)
