"""A mixture of experts on the device alone: nothing here waits for the GPU, and no shape depends on what is chosen.

The choices of all tokens are sorted by expert, and each expert's are laid out from a new block of rows on, so that a
block is one expert's. There are as many blocks as there might have to be; those without rows end at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.kernels.gpu.device import experts as kernels
from engine.kernels.gpu.launch import Call, parts, power_of_two, row_warps
from engine.kernels.gpu.rows import STRIP
from engine.kernels.table import Activation, MoeWeights


@dataclass(frozen=True)
class ProductTile:
    """rows, columns of a tile of the result; depth: of the inputs that are multiplied at once."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def product_tile(dtype: torch.dtype) -> ProductTile:
    """One tile for any number of tokens: a token's result must not depend on how many others took its expert.

    Few rows, since a decode has few tokens an expert; a weight is still multiplied 16 times for once that it is read.
    """
    if dtype == torch.float32:
        return ProductTile(rows=16, columns=32, depth=32, warps=4, stages=2)
    return ProductTile(rows=16, columns=64, depth=64, warps=4, stages=3)


@dataclass(frozen=True, eq=False)
class ExpertTable:
    """Where the experts' weights lie: int64 [E] each, addresses on the device; no biases: None. width: F."""

    gate_ups: torch.Tensor
    downs: torch.Tensor
    gate_up_biases: torch.Tensor | None
    down_biases: torch.Tensor | None
    width: int


def expert_table(weights: MoeWeights, device: torch.device) -> ExpertTable:
    """Weights never move, so one table serves for good."""
    gate_up, down = weights.gate_ups[0], weights.downs[0]
    return ExpertTable(
        _addresses([matrix.weight for matrix in weights.gate_ups], device),
        _addresses([matrix.weight for matrix in weights.downs], device),
        None if gate_up.offset is None else _addresses([matrix.offset for matrix in weights.gate_ups], device),
        None if down.offset is None else _addresses([matrix.offset for matrix in weights.downs], device),
        down.weight.shape[1],
    )


def _addresses(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    addresses = [0 if tensor.device.type == "meta" else tensor.data_ptr() for tensor in tensors]
    return torch.tensor(addresses, dtype=torch.int64).to(device)


def choose_call(logits: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, *, normalise: bool) -> Call:
    """logits: float32 [T, E]. Writes ids, int32 [T, top_k], best first, and shares, float32 [T, top_k]."""
    experts = logits.shape[1]
    constants = {
        "EXPERTS": experts, "BLOCK": power_of_two(experts), "TOP": ids.shape[1], "NORMALISE": normalise,
    }  # fmt: skip
    arguments = {"logits": logits, "ids": ids, "shares": shares}
    return Call(kernels.choose, (logits.shape[0], 1, 1), arguments, constants, warps=1)


def laid_out(ids: torch.Tensor, experts: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of `rows` choices of one expert each, for ids [T, top_k].

    Returns the expert of each block, int32 [blocks], `experts` for one that is not needed, and the choices in it,
    int32 [blocks, rows]: t * top_k + rank, or -1.
    """
    flat = ids.reshape(-1).to(torch.int64)
    count, device = flat.shape[0], flat.device
    blocks = min(count, parts(count, rows) + experts)
    sizes = torch.zeros(experts, dtype=torch.int64, device=device).scatter_add_(0, flat, torch.ones_like(flat))
    ends = torch.cumsum((sizes + rows - 1) // rows, 0)
    in_order, order = torch.sort(flat, stable=True)
    before = torch.cumsum(sizes, 0) - sizes
    starts = (ends - (sizes + rows - 1) // rows) * rows
    place = starts[in_order] + torch.arange(count, device=device) - before[in_order]
    table = torch.full((blocks * rows,), -1, dtype=torch.int32, device=device)
    table.scatter_(0, place, order.to(torch.int32))
    owners = torch.searchsorted(ends, torch.arange(blocks, device=device), right=True).to(torch.int32)
    return owners, table.view(blocks, rows)


def grouped_call(
    x: torch.Tensor,
    addresses: torch.Tensor,
    biases: torch.Tensor | None,
    blocks: tuple[torch.Tensor, torch.Tensor],
    each: int,
    out: torch.Tensor,
    *,
    activation: Activation | None = None,
) -> Call:
    """out [T * top_k, outputs]: of each choice c, its expert's matrix times x[c // each].

    activation: of gated matrices; None for others.
    """
    tile = product_tile(x.dtype)
    owners, rows = blocks
    arguments = {
        "x": x, "weights": addresses, "biases": biases, "block_experts": owners, "block_rows": rows, "out": out,
    }  # fmt: skip
    constants = {
        "INPUTS": x.shape[1], "OUTPUTS": out.shape[1], "EACH": each, "EXPERTS": addresses.shape[0],
        "GATED": activation is not None, "ACTIVATION": activation or "identity", "ROWS": tile.rows,
        "COLUMNS": tile.columns, "DEPTH": tile.depth,
    }  # fmt: skip
    grid = (owners.shape[0], parts(out.shape[1], tile.columns), 1)
    return Call(kernels.grouped_product, grid, arguments, constants, tile.warps, tile.stages)


def combine_call(
    partial: torch.Tensor,
    shares: torch.Tensor,
    shared: torch.Tensor | None,
    shared_gate: torch.Tensor | None,
    out: torch.Tensor,
) -> Call:
    """partial: float32 [T * top_k, H]. shared: [T, H], shared_gate: [T, 1], before its sigmoid."""
    width = out.shape[1]
    block = min(STRIP, power_of_two(width))
    arguments = {"parts": partial, "shares": shares, "shared": shared, "shared_gate": shared_gate, "out": out}
    constants = {"WIDTH": width, "BLOCK": block, "TOP": shares.shape[1]}
    return Call(kernels.combine, (out.shape[0], parts(width, block), 1), arguments, constants, row_warps(block))
