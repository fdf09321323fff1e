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
from engine.kernels.table import Activation, MoeWeights, Pooling, RotaryFrequencies, SharedExpert

# Elements of the head that are converted to float32 at once: a copy that stays in the CPU's cache.
LOGITS_BLOCK = 1 << 20


@dataclass(frozen=True, eq=False)
class StepContext:
    """What the layers of a step share.

    rotations: cos and sin of each rotary: float32 [T, 1, rotary_dim], the attention factor included; sin is negated in
    the first half.
    slots: the batch's. attention: window → which rows read which keys.
    """

    rotations: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    slots: torch.Tensor
    attention: dict[int | None, AttentionPlan]


def begin_step(
    batch: RaggedBatch,
    rotaries: tuple[RotaryFrequencies, ...],
    kv_heads: int,
    windows: tuple[int | None, ...],
    *,
    causal: bool = True,
) -> StepContext:
    return StepContext(
        rotations=tuple(_rotation(batch.positions, rotary) for rotary in rotaries),
        slots=batch.slots,
        attention={window: plan_attention(batch, window, causal=causal) for window in windows},
    )


def _rotation(positions: torch.Tensor, rotary: RotaryFrequencies) -> tuple[torch.Tensor, torch.Tensor]:
    angles = (positions.to(torch.float32)[:, None] * rotary.inverse)[:, None, :]
    cos, sin = angles.cos() * rotary.factor, angles.sin() * rotary.factor
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def embedding(token_ids: torch.Tensor, weight: DenseMatrix, scale: float = 1.0, first: int = 0) -> torch.Tensor:
    own, size = token_ids - first, len(weight.weight)
    rows = functional.embedding(own.clamp(0, size - 1), weight.weight)
    rows = rows.masked_fill(((own < 0) | (own >= size))[:, None], 0.0)
    return rows if scale == 1.0 else rows * scale


def embedding_sum(
    batch: RaggedBatch,
    tokens: DenseMatrix,
    positions: DenseMatrix | None,
    types: DenseMatrix | None,
    first_position: int,
    first: int = 0,
) -> torch.Tensor:
    total = embedding(batch.token_ids, tokens, first=first)
    if types is not None:
        type_ids = torch.zeros_like(batch.token_ids) if batch.type_ids is None else batch.type_ids
        total = total + functional.embedding(type_ids, types.weight)
    if positions is not None:
        total = total + functional.embedding(batch.positions + first_position, positions.weight)
    return total


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """Of one rank. With several, the program calls their group instead."""
    return x


def activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    match activation:
        case "identity":
            return x
        case "silu":
            return functional.silu(x)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "relu":
            return functional.relu(x)
        case "tanh":
            return torch.tanh(x)


def linear(x: torch.Tensor, weight: DenseMatrix, activation: Activation = "identity") -> torch.Tensor:
    return activate(functional.linear(x, weight.weight, weight.offset), activation)


def gated_linear(x: torch.Tensor, weight: DenseMatrix, activation: Activation = "silu") -> torch.Tensor:
    gate, up = linear(x, weight).chunk(2, dim=-1)
    return activate(gate, activation) * up


def route(x: torch.Tensor, weights: MoeWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """Which experts each token takes, best first: int64 [T, top_k], and their shares, float32 (float64 for such x)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    found = functional.linear(x.to(wide), weights.router.weight.to(wide))
    ids = found.sort(dim=-1, descending=True, stable=True).indices[:, : weights.top_k]
    shares = found.softmax(dim=-1).gather(1, ids)
    return ids, shares / shares.sum(dim=-1, keepdim=True) if weights.normalise else shares


def moe(x: torch.Tensor, weights: MoeWeights) -> torch.Tensor:
    return mixture(x, weights, *route(x, weights))


def mixture(x: torch.Tensor, weights: MoeWeights, ids: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """The experts' sum, for tokens that are routed: the tokens of an expert are computed together."""
    parts = torch.empty((*ids.shape, x.shape[1]), dtype=shares.dtype, device=x.device)
    for expert in ids.unique().tolist():
        tokens, ranks = torch.where(ids == expert)
        gated = gated_linear(x[tokens], weights.gate_ups[expert])
        parts[tokens, ranks] = linear(gated, weights.downs[expert]).to(parts.dtype)
    total = torch.zeros_like(parts[:, 0])
    for rank in range(ids.shape[1]):
        total = total + parts[:, rank] * shares[:, rank, None]
    if weights.shared is not None:
        total = total + shared_expert(x, weights.shared)
    return total.to(x.dtype)


def shared_expert(x: torch.Tensor, weights: SharedExpert) -> torch.Tensor:
    return torch.sigmoid(linear(x, weights.gate)) * linear(gated_linear(x, weights.gate_up), weights.down)


def rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x if residual is None else x + residual
    return _rms_normed(total, weight, eps), total


def _rms_normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The scale may be more precise than x, which it is multiplied with before that is rounded."""
    if weight.dtype == x.dtype:
        return functional.rms_norm(x, weight.shape, weight, eps)
    return functional.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)


def layer_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    total = x if residual is None else x + residual
    return functional.layer_norm(total, weight.shape, weight, bias, eps)


def rotary_store(
    qkv: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    keys: torch.Tensor,
    values: torch.Tensor,
    rotary: int | None,
    step: StepContext,
) -> torch.Tensor:
    kv_heads, head_dim = keys.shape[0], keys.shape[2]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    query_heads = heads.shape[1] - 2 * kv_heads
    rotated = heads[:, : query_heads + kv_heads]
    if q_norm is not None and k_norm is not None:
        queries, new_keys = rotated[:, :query_heads], rotated[:, query_heads:]
        rotated = torch.cat((_rms_normed(queries, q_norm, eps), _rms_normed(new_keys, k_norm, eps)), dim=1)
    if rotary is not None:
        rotated = _rotate(rotated, *step.rotations[rotary])
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
    bias = None if weight.offset is None else weight.offset.to(torch.float32)
    if head.dtype == torch.float32:
        return functional.linear(rows, head, bias)
    # Logits rounded to bfloat16 would tie; a matrix product that returns float32 needs float32 inputs on a CPU.
    rows = rows.to(torch.float32)
    block = max(1, LOGITS_BLOCK // head.shape[1])
    found = torch.cat([functional.linear(rows, part.to(torch.float32)) for part in head.split(block)], dim=-1)
    return found if bias is None else found + bias


def vectors(rows: torch.Tensor) -> torch.Tensor:
    return rows.to(torch.float32)


def pool(hidden: torch.Tensor, batch: RaggedBatch, rows: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """What the head gets (`table.Pooling`): hidden [T, H] → [R, H]."""
    if pooling == "row":
        return hidden[rows]
    first = {stop - 1: start for start, stop in zip(batch.query_starts, batch.query_starts[1:], strict=False)}
    sequences = [hidden[first[row] : row + 1] for row in rows.tolist()]
    match pooling:
        case "first":
            return torch.stack([sequence[0] for sequence in sequences])
        case "mean":
            return torch.stack([sequence.float().mean(dim=0).to(hidden.dtype) for sequence in sequences])
        case "max":
            return torch.stack([sequence.amax(dim=0) for sequence in sequences])
