"""The op table in plain torch, on any device torch knows: the oracle of the other implementations.

`engine.kernels.table.Ops` documents every function here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from engine.kernels.batch import RaggedBatch
from engine.kernels.reference_attention import AttentionPlan, attend, plan_attention
from engine.kernels.table import RotaryFrequencies


@dataclass(frozen=True, eq=False)
class StepContext:
    """What the layers of a step share.

    cos, sin: float32 [T, 1, rotary_dim / 2], the attention factor included.
    slots: the batch's. attention: window → which rows read which slots.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    slots: torch.Tensor
    attention: dict[int | None, AttentionPlan]


def begin_step(batch: RaggedBatch, rotary: RotaryFrequencies, windows: tuple[int | None, ...]) -> StepContext:
    angles = (batch.positions.to(torch.float32)[:, None] * rotary.inverse)[:, None, :]
    return StepContext(
        cos=angles.cos() * rotary.factor,
        sin=angles.sin() * rotary.factor,
        slots=batch.slots,
        attention={window: plan_attention(batch, window) for window in windows},
    )


def embedding(token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.embedding(token_ids, weight)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return functional.linear(x, weight, bias)


def rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x if residual is None else x + residual
    return functional.rms_norm(total, weight.shape, weight, eps), total


def rotary_store(
    qkv: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    keys: torch.Tensor,
    values: torch.Tensor,
    step: StepContext,
) -> torch.Tensor:
    kv_heads, head_dim = keys.shape[1:]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    query_heads = heads.shape[1] - 2 * kv_heads
    rotated = heads[:, : query_heads + kv_heads]
    if q_norm is not None and k_norm is not None:
        queries, new_keys = rotated.split([query_heads, kv_heads], dim=1)
        q_normed = functional.rms_norm(queries, q_norm.shape, q_norm, eps)
        k_normed = functional.rms_norm(new_keys, k_norm.shape, k_norm, eps)
        rotated = torch.cat((q_normed, k_normed), dim=1)
    rotated = _rotate(rotated, step.cos, step.sin)
    keys.index_copy_(0, step.slots, rotated[:, query_heads:].to(keys.dtype))
    values.index_copy_(0, step.slots, heads[:, query_heads + kv_heads :].to(values.dtype))
    return rotated[:, :query_heads]


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """heads: [T, heads, D]; computed in float32, returned in the dtype of `heads`."""
    half = cos.shape[-1]
    first, second, rest = heads.split([half, half, heads.shape[-1] - 2 * half], dim=-1)
    pieces = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([piece.to(heads.dtype) for piece in pieces] + ([rest] if rest.shape[-1] else []), dim=-1)


def attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
    step: StepContext,
) -> torch.Tensor:
    return attend(step.attention[window], queries, keys, values, scale)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def logits(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.linear(rows, weight).to(torch.float32)
