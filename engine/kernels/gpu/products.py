"""Products of activations and weights by torch (cuBLAS on a GPU), such that a row's result depends on the row alone.

cuBLAS picks another algorithm, with another order of summation, for another number of rows. So it is always given the
same number: rows are padded to blocks of ROW_BLOCK, each of which is one call. What stands in the padding does not
matter, and the padding is no copy: activations lie in buffers that have room for whole blocks.
"""

from __future__ import annotations

import os

import torch

from engine.kernels.dense import DenseMatrix
from engine.kernels.gpu.launch import parts

# A decode of few rows waits for the weights anyway: for a weight of 2 bytes an H100 has time for some 600 operations,
# and 128 rows want 256. A prefill of 1,024 rows reads the weights eight times, about as long as its products take.
ROW_BLOCK = 128
# The head's results are float32 and as wide as the vocabulary; a step wants few rows of it.
HEAD_BLOCK = 64
# Weights of a block of the head on the CPU, where products that return float32 need float32 weights.
_HOST_BLOCK = 1 << 20


def make_products_exact() -> None:
    """Tell torch and cuBLAS, for this process, to sum in float32 and to use the same workspace always."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = False
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_fp16_reduced_precision_reduction = False


def padded_empty(
    rows: int, width: int, dtype: torch.dtype, device: torch.device, block: int = ROW_BLOCK
) -> torch.Tensor:
    """[rows, width], not initialised, with room behind it for whole blocks of rows."""
    return torch.empty((parts(rows, block) * block, width), dtype=dtype, device=device)[:rows]


def padded(x: torch.Tensor, block: int = ROW_BLOCK) -> torch.Tensor:
    """x [rows, width] and whatever stands behind it, up to whole blocks of rows; a copy only where there is no room."""
    rows, width = parts(x.shape[0], block) * block, x.shape[1]
    if x.is_contiguous():
        room = x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()
        if room >= rows * width:
            return x.as_strided((rows, width), (width, 1))
    whole = torch.zeros((rows, width), dtype=x.dtype, device=x.device)
    whole[: x.shape[0]] = x
    return whole


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [rows, in] times the transpose of weight [out, in], without bias → [rows, out] with room for blocks."""
    whole = padded(x)
    out = torch.empty((whole.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    for start in range(0, whole.shape[0], ROW_BLOCK):
        torch.mm(whole[start : start + ROW_BLOCK], weight.t(), out=out[start : start + ROW_BLOCK])
    return out[: x.shape[0]]


def head_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same → float32 [rows, out], not rounded to the weights' dtype."""
    whole = padded(x, HEAD_BLOCK)
    out = torch.empty((whole.shape[0], weight.shape[0]), dtype=torch.float32, device=x.device)
    for start in range(0, whole.shape[0], HEAD_BLOCK):
        _wide_product(whole[start : start + HEAD_BLOCK], weight, out[start : start + HEAD_BLOCK])
    return out[: x.shape[0]]


def _wide_product(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    if weight.dtype == torch.float32:
        torch.mm(rows, weight.t(), out=out)
    elif weight.device.type == "cuda":
        torch.mm(rows, weight.t(), out_dtype=torch.float32, out=out)
    else:
        block, wide = max(1, _HOST_BLOCK // weight.shape[1]), rows.to(torch.float32)
        for start in range(0, weight.shape[0], block):
            torch.mm(wide, weight[start : start + block].to(torch.float32).t(), out=out[:, start : start + block])


def gpu_matrix(
    outputs: int, inputs: int, dtype: torch.dtype, device: torch.device, *, bias: bool = False
) -> DenseMatrix:
    """Weights in plain rows, unfilled."""
    weight = torch.empty((outputs, inputs), dtype=dtype, device=device)
    return DenseMatrix(weight, torch.empty(outputs, dtype=dtype, device=device) if bias else None)
