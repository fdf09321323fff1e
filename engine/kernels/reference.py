"""The op table in plain torch, on any device torch knows: the oracle of the other implementations.

`engine.kernels.table.Ops` documents every function here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from engine.kernels.batch import RaggedBatch
from engine.kernels.dense import DenseMatrix
from engine.kernels.reference_attention import AttentionPlan, attend, plan_attention
from engine.kernels.table import RotaryFrequencies

# Elements of the head that are converted to float32 at once: a copy that stays in the CPU's cache.
LOGITS_BLOCK = 1 << 20


@dataclass(frozen=True, eq=False)
class StepContext:
    """What the layers of a step share.

    cos, sin: float32 [T, 1, rotary_dim], the attention factor included; sin is negated in the first half.
    slots: the batch's. attention: window → which rows read which keys.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    slots: torch.Tensor
    attention: dict[int | None, AttentionPlan]


def begin_step(
    batch: RaggedBatch, rotary: RotaryFrequencies, kv_heads: int, windows: tuple[int | None, ...]
) -> StepContext:
    angles = (batch.positions.to(torch.float32)[:, None] * rotary.inverse)[:, None, :]
    cos, sin = angles.cos() * rotary.factor, angles.sin() * rotary.factor
    return StepContext(
        cos=torch.cat((cos, cos), dim=-1),
        sin=torch.cat((-sin, sin), dim=-1),
        slots=batch.slots,
        attention={window: plan_attention(batch, window) for window in windows},
    )


def embedding(token_ids: torch.Tensor, weight: DenseMatrix) -> torch.Tensor:
    return functional.embedding(token_ids, weight.weight)


def linear(x: torch.Tensor, weight: DenseMatrix) -> torch.Tensor:
    return functional.linear(x, weight.weight, weight.offset)


def gated_linear(x: torch.Tensor, weight: DenseMatrix) -> torch.Tensor:
    gate, up = linear(x, weight).chunk(2, dim=-1)
    return functional.silu(gate) * up


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
    kv_heads, head_dim = keys.shape[0], keys.shape[2]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    query_heads = heads.shape[1] - 2 * kv_heads
    rotated = heads[:, : query_heads + kv_heads]
    if q_norm is not None and k_norm is not None:
        queries, new_keys = rotated[:, :query_heads], rotated[:, query_heads:]
        q_normed = functional.rms_norm(queries, q_norm.shape, q_norm, eps)
        k_normed = functional.rms_norm(new_keys, k_norm.shape, k_norm, eps)
        rotated = torch.cat((q_normed, k_normed), dim=1)
    rotated = _rotate(rotated, step.cos, step.sin)
    keys.index_copy_(1, step.slots, rotated[:, query_heads:].to(keys.dtype).transpose(0, 1))
    values.index_copy_(1, step.slots, heads[:, query_heads + kv_heads :].to(values.dtype).transpose(0, 1))
    return rotated[:, :query_heads]


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """heads: [T, heads, D]; computed in float32, returned in the dtype of `heads`."""
    rotary_dim = cos.shape[-1]
    turned = heads[..., :rotary_dim]
    turned = torch.addcmul(turned * cos, turned.roll(rotary_dim // 2, dims=-1), sin).to(heads.dtype)
    return turned if rotary_dim == heads.shape[-1] else torch.cat((turned, heads[..., rotary_dim:]), dim=-1)


def attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
    step: StepContext,
) -> torch.Tensor:
    return attend(step.attention[window], queries, keys, values, scale)


def logits(rows: torch.Tensor, weight: DenseMatrix) -> torch.Tensor:
    head = weight.weight
    if head.dtype == torch.float32:
        return functional.linear(rows, head)
    # Logits rounded to bfloat16 would tie; a matrix product that returns float32 needs float32 inputs on a CPU.
    rows = rows.to(torch.float32)
    block = max(1, LOGITS_BLOCK // head.shape[1])
    return torch.cat([functional.linear(rows, part.to(torch.float32)) for part in head.split(block)], dim=-1)
