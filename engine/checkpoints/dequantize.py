"""Turn GGUF's blocks into float32, a few rows at a time.

What the blocks mean: ggml-quants.c of https://github.com/ggml-org/ggml. The gguf package does all kinds, in numpy with
many temporaries: 2.0 s for the default model. The kinds that small models mostly come in are done here with torch on
buffers that stay in the cache, 0.4 s; results are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.gguf_file import KINDS

# What of GGUF is a plain torch dtype.
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def dequantize_into(kind: int, data: torch.Tensor, out: torch.Tensor) -> None:
    """Dequantise whole rows.

    kind: a gguf.GGMLQuantizationType's value. data: uint8 [rows, bytes of a row], contiguous. out: float32 [rows,
    columns], contiguous. Raises CheckpointError for kinds that the gguf package does not dequantise.
    """
    name, block, block_bytes = KINDS[kind]
    fast = _FAST.get(name)
    if name in PLAIN:
        out.copy_(data.view(PLAIN[name]))
    elif fast is not None:
        fast(data.view(-1, block_bytes), out.view(-1, block))
    else:
        _by_gguf(kind, data, out)


def _q8_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """[scale: f16, 32 × int8]"""
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_halves(blocks, 1))


def _q4_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """[scale: f16, 16 × (low nibble: element i, high nibble: element 16 + i)], values are nibble - 8"""
    out.copy_(_nibbles(blocks[:, 2:]).sub_(8).view(torch.int8)).mul_(_halves(blocks, 1))


def _q4_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """[scale: f16, minimum: f16, 16 × two nibbles as in Q4_0], values are nibble × scale + minimum"""
    halves = _halves(blocks, 2)
    out.copy_(_nibbles(blocks[:, 4:])).mul_(halves[:, :1]).add_(halves[:, 1:])


_FAST: dict[str, Callable[[torch.Tensor, torch.Tensor], None]] = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1}


def _halves(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """The float16 numbers that a block starts with, as float32 [blocks, count]."""
    return blocks[:, : 2 * count].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [blocks, 16] → uint8 [blocks, 32]: all low nibbles, then all high ones."""
    out = torch.empty((packed.shape[0], 2, packed.shape[1]), dtype=torch.uint8)
    torch.bitwise_and(packed, 15, out=out[:, 0])
    torch.bitwise_right_shift(packed, 4, out=out[:, 1])
    return out.view(packed.shape[0], -1)


def _by_gguf(kind: int, data: torch.Tensor, out: torch.Tensor) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, quants

    try:
        with np.errstate(all="ignore"):
            values = quants.dequantize(data.numpy(), GGMLQuantizationType(kind))
    except NotImplementedError:
        raise CheckpointError(f"tensors of kind {KINDS[kind][0]} cannot be dequantised") from None
    out.copy_(torch.from_numpy(values))
