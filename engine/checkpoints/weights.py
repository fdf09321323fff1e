"""Reading weights: tensor by tensor, from memory-mapped files, straight into their place and dtype."""

from __future__ import annotations

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
