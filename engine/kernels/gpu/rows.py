"""Launches of the kernels that work row by row. Tensors are contiguous; what is written is given."""

from __future__ import annotations

import torch

from engine.kernels.batch import RaggedBatch
from engine.kernels.gpu.device import rotary as rotary_kernel
from engine.kernels.gpu.device import rows as kernels
from engine.kernels.gpu.launch import Call, parts, power_of_two, row_warps
from engine.kernels.table import Activation, Pooling

# Entries that a program of an elementwise kernel works on.
STRIP = 1024
# Channels of a token's heads that a program rotates; with twice as many some builds spill.
ROTATED = 2048
# A norm holds a whole row in registers.
WIDEST_ROW = 1 << 16


def _row_shape(width: int) -> tuple[dict[str, int], int]:
    if width > WIDEST_ROW:
        raise ValueError(f"rows of {width} entries are normed; at most {WIDEST_ROW} can be")
    return {"WIDTH": width, "BLOCK": power_of_two(width)}, row_warps(width)


def _strips(rows: int, width: int) -> tuple[tuple[int, int, int], dict[str, int], int]:
    block = min(STRIP, power_of_two(width))
    return (rows, parts(width, block), 1), {"WIDTH": width, "BLOCK": block}, row_warps(block)


def rms_norm_call(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    normed: torch.Tensor,
    total: torch.Tensor | None,
) -> Call:
    """total: written where there is a residual."""
    shape, warps = _row_shape(x.shape[1])
    arguments = {"x": x, "residual": residual, "weight": weight, "normed": normed, "total": total, "eps": eps}
    return Call(kernels.rms_norm, (x.shape[0], 1, 1), arguments, shape, warps)


def layer_norm_call(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    normed: torch.Tensor,
) -> Call:
    shape, warps = _row_shape(x.shape[1])
    arguments = {"x": x, "residual": residual, "weight": weight, "bias": bias, "normed": normed, "eps": eps}
    return Call(kernels.layer_norm, (x.shape[0], 1, 1), arguments, shape, warps)


def embedding_call(ids: torch.Tensor, weight: torch.Tensor, scale: float, first: int, out: torch.Tensor) -> Call:
    """first: the id that row 0 of `weight` is of."""
    grid, shape, warps = _strips(*out.shape)
    arguments = {
        "ids": ids, "weight": weight, "out": out, "scale": float(scale), "first": first, "held": len(weight),
    }  # fmt: skip
    return Call(kernels.embed, grid, arguments, shape, warps)


def embedding_sum_call(
    batch: RaggedBatch,
    tokens: torch.Tensor,
    positions: torch.Tensor | None,
    types: torch.Tensor | None,
    first_position: int,
    first: int,
    out: torch.Tensor,
) -> Call:
    """first: the id that row 0 of `tokens` is of."""
    grid, shape, warps = _strips(*out.shape)
    arguments = {
        "ids": batch.token_ids, "places": batch.positions, "type_ids": batch.type_ids, "tokens": tokens,
        "positions": positions, "types": types, "out": out, "first_position": first_position,
        "first": first, "held": len(tokens),
    }  # fmt: skip
    return Call(kernels.embed_sum, grid, arguments, shape, warps)


def finish_call(x: torch.Tensor, bias: torch.Tensor | None, activation: Activation) -> Call:
    """In place."""
    grid, shape, warps = _strips(*x.shape)
    return Call(kernels.finish, grid, {"x": x, "bias": bias}, {**shape, "ACTIVATION": activation}, warps)


def gate_call(x: torch.Tensor, bias: torch.Tensor | None, activation: Activation, out: torch.Tensor) -> Call:
    """x: [T, 2 F], out: [T, F]."""
    grid, shape, warps = _strips(*out.shape)
    return Call(kernels.gate, grid, {"x": x, "bias": bias, "out": out}, {**shape, "ACTIVATION": activation}, warps)


def add_up_call(parts_of_ranks: torch.Tensor, out: torch.Tensor) -> Call:
    """parts_of_ranks: [ranks, *out.shape], of out's dtype; both contiguous."""
    count, block = out.numel(), min(STRIP, power_of_two(out.numel()))
    arguments = {"parts": parts_of_ranks, "out": out, "count": count}
    constants = {"RANKS": len(parts_of_ranks), "BLOCK": block}
    return Call(kernels.add_up, (parts(count, block), 1, 1), arguments, constants, row_warps(block))


def pool_call(x: torch.Tensor, starts: torch.Tensor, stops: torch.Tensor, pooling: Pooling, out: torch.Tensor) -> Call:
    """pooling: "mean" or "max". starts, stops: int32 [R]."""
    grid, shape, warps = _strips(*out.shape)
    arguments = {"x": x, "starts": starts, "stops": stops, "out": out}
    return Call(kernels.pool, grid, arguments, {**shape, "POOLING": pooling}, warps, stages=3)


def rotary_store_call(
    qkv: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    slots: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> Call:
    """queries: [T, Q, D], written. rotation: cos and sin, float32 [T, rotary_dim / 2]."""
    kv_heads, dim = keys.shape[0], keys.shape[2]
    all_heads = queries.shape[1] + 2 * kv_heads
    heads = min(max(1, ROTATED // power_of_two(dim)), power_of_two(all_heads))
    cos, sin = (None, None) if rotation is None else rotation
    arguments = {
        "qkv": qkv, "q_norm": q_norm, "k_norm": k_norm, "cos": cos, "sin": sin, "slots": slots, "queries": queries,
        "keys": keys, "values": values, "eps": eps, "head_stride": keys.stride(0),
    }  # fmt: skip
    constants = {
        "QUERY_HEADS": queries.shape[1], "KV_HEADS": kv_heads, "DIM": dim, "BLOCK": power_of_two(dim),
        "HALF": 0 if cos is None else cos.shape[1], "HEADS": heads,
    }  # fmt: skip
    grid = (qkv.shape[0], parts(all_heads, heads), 1)
    return Call(rotary_kernel.rotary_store, grid, arguments, constants, warps=4)
