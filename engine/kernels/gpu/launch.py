"""A launch as a value: which kernel, on which grid, with what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Call:
    """One launch of a kernel.

    grid: programs along three axes; none are launched where one of them is 0. arguments: tensors, numbers and None by
    the kernel's names. constants: what the kernel is compiled for. warps, stages: of a program, the depth of its loads.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2

    def run(self) -> None:
        """Launch it on the current stream; nothing waits."""
        if 0 not in self.grid:
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """Without fused multiply-adds: where the compiler may contract, the same expression rounds differently in two
        kernels, and a token's bits would depend on which of them computed it. Products of tiles are not concerned."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}

    @property
    def name(self) -> str:
        return str(getattr(self.kernel, "__name__", self.kernel))


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`: shapes of tiles must be such."""
    return 1 << max(0, size - 1).bit_length()


def row_warps(width: int) -> int:
    """Warps for a row of `width` entries held at once: some eight to sixteen entries a thread."""
    return min(16, max(1, power_of_two(width) // 512))


def parts(size: int, each: int) -> int:
    """How many pieces of `each` cover `size`."""
    return -(-size // each)


def as_tensor(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """numpy, a list or a tensor, on the device: copied from pinned memory without waiting where the device is a GPU."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if tensor.device.type == device.type:
        return tensor
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
