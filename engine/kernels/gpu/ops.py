"""The op table on a device. No op waits for the GPU, and no shape depends on values but those of the batch's tuples.

What `begin_step` and the first attention of a step copy to the device comes from pinned memory. Results lie in memory
of torch's caching allocator, with room behind them for whole blocks of rows (`products`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import methodcaller

import torch

from engine.kernels.batch import RaggedBatch
from engine.kernels.dense import DenseMatrix
from engine.kernels.gpu import rows as row_calls
from engine.kernels.gpu.attention import AttentionPlan, attention_calls, plan_attention
from engine.kernels.gpu.experts import (
    ExpertTable,
    choose_call,
    combine_call,
    expert_table,
    grouped_call,
    laid_out,
    product_tile,
)
from engine.kernels.gpu.launch import Call, as_tensor
from engine.kernels.gpu.products import head_product, padded_empty, product
from engine.kernels.table import Activation, MoeWeights, Pooling, RotaryFrequencies, Rows, SharedExpert
from engine.parallel.division import even_parts
from engine.parallel.group import ALONE, DeviceGroup

Rotation = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class StepContext:
    """What the layers of a step share. rotations: cos and sin of each rotary, float32 [T, rotary_dim / 2]."""

    rotations: tuple[Rotation, ...]
    slots: torch.Tensor
    attention: AttentionPlan


@dataclass(slots=True)
class GpuOps:
    """launch: what is done with each kernel's launch; products go to torch.

    group: the ranks that the model is divided among.

    routed: what each mixture of experts of the step has chosen, int32 [T, top_k].

    inverses, tables: the rotaries' frequencies and the experts' addresses on the device, made when first needed.

    plan: attention's, where it does not follow from the step's batch.
    """

    device: torch.device
    launch: Callable[[Call], None] = methodcaller("run")
    group: DeviceGroup = ALONE
    routed: list[torch.Tensor] = field(default_factory=list)
    inverses: dict[int, tuple[RotaryFrequencies, torch.Tensor]] = field(default_factory=dict)
    tables: dict[int, tuple[MoeWeights, ExpertTable]] = field(default_factory=dict)
    plan: AttentionPlan | None = None

    def begin_step(
        self,
        batch: RaggedBatch,
        rotaries: tuple[RotaryFrequencies, ...],
        kv_heads: int,
        windows: tuple[int | None, ...],
        *,
        causal: bool = True,
    ) -> StepContext:
        rotations = tuple(self._rotation(batch.positions, rotary) for rotary in rotaries)
        return StepContext(rotations, batch.slots, self.plan or plan_attention(batch, causal=causal))

    def _rotation(self, positions: torch.Tensor, rotary: RotaryFrequencies) -> Rotation:
        """By torch, whose cosine holds for large angles too; a GPU's quick one does not."""
        if id(rotary) not in self.inverses:
            self.inverses[id(rotary)] = (rotary, rotary.inverse.to(self.device))
        angles = positions.to(torch.float32)[:, None] * self.inverses[id(rotary)][1]
        return angles.cos() * rotary.factor, angles.sin() * rotary.factor

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Where x lies, with the room that is behind it. In one kernel behind the gathering: `Group.all_reduce` would
        take two for each rank."""
        if self.group.size > 1:
            self.launch(row_calls.add_up_call(self.group.all_gather(x), x))
        return x

    def embedding(
        self, token_ids: torch.Tensor, weight: DenseMatrix, scale: float = 1.0, first: int = 0
    ) -> torch.Tensor:
        out = self._empty(token_ids.shape[0], weight.weight.shape[1], weight.weight.dtype)
        self.launch(row_calls.embedding_call(token_ids, weight.weight, scale, first, out))
        return out

    def embedding_sum(
        self,
        batch: RaggedBatch,
        tokens: DenseMatrix,
        positions: DenseMatrix | None,
        types: DenseMatrix | None,
        first_position: int,
        first: int = 0,
    ) -> torch.Tensor:
        out = self._empty(batch.num_tokens, tokens.weight.shape[1], tokens.weight.dtype)
        places, kinds = (None if part is None else part.weight for part in (positions, types))
        self.launch(row_calls.embedding_sum_call(batch, tokens.weight, places, kinds, first_position, first, out))
        return out

    def linear(self, x: torch.Tensor, weight: DenseMatrix, activation: Activation = "identity") -> torch.Tensor:
        out = product(x, weight.weight)
        if weight.offset is not None or activation != "identity":
            self.launch(row_calls.finish_call(out, weight.offset, activation))
        return out

    def gated_linear(self, x: torch.Tensor, weight: DenseMatrix, activation: Activation = "silu") -> torch.Tensor:
        both = product(x, weight.weight)
        out = self._empty(x.shape[0], both.shape[1] // 2, x.dtype)
        self.launch(row_calls.gate_call(both, weight.offset, activation, out))
        return out

    def moe(self, x: torch.Tensor, weights: MoeWeights) -> torch.Tensor:
        tokens, top = x.shape[0], weights.top_k
        router = weights.router.weight.to(torch.float32)
        ids = torch.empty((tokens, top), dtype=torch.int32, device=self.device)
        shares = torch.empty((tokens, top), dtype=torch.float32, device=self.device)
        self.launch(choose_call(product(x.to(torch.float32), router), ids, shares, normalise=weights.normalise))
        self.routed.append(ids)
        table, blocks = self._table(weights), laid_out(ids, router.shape[0], product_tile(x.dtype).rows)
        gated = torch.empty((tokens * top, table.width), dtype=x.dtype, device=self.device)
        self.launch(grouped_call(x, table.gate_ups, table.gate_up_biases, blocks, top, gated, activation="silu"))
        partial = torch.empty((tokens * top, x.shape[1]), dtype=torch.float32, device=self.device)
        self.launch(grouped_call(gated, table.downs, table.down_biases, blocks, 1, partial))
        out = self._empty(tokens, x.shape[1], x.dtype)
        self.launch(combine_call(partial, shares, *self._shared(x, weights.shared), out))
        return out

    def _table(self, weights: MoeWeights) -> ExpertTable:
        if id(weights) not in self.tables:
            self.tables[id(weights)] = (weights, expert_table(weights, self.device))
        return self.tables[id(weights)][1]

    def _shared(self, x: torch.Tensor, weights: SharedExpert | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if weights is None:
            return None, None
        return self.linear(self.gated_linear(x, weights.gate_up), weights.down), self.linear(x, weights.gate)

    def rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed = self._empty(x.shape[0], x.shape[1], x.dtype)
        total = None if residual is None else self._empty(x.shape[0], x.shape[1], x.dtype)
        self.launch(row_calls.rms_norm_call(x, residual, weight, eps, normed, total))
        return normed, x if total is None else total

    def layer_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        out = self._empty(x.shape[0], x.shape[1], x.dtype)
        self.launch(row_calls.layer_norm_call(x, residual, weight, bias, eps, out))
        return out

    def rotary_store(
        self,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        keys: torch.Tensor,
        values: torch.Tensor,
        rotary: int | None,
        step: StepContext,
    ) -> torch.Tensor:
        tokens, dim = qkv.shape[0], keys.shape[2]
        queries = self._empty(tokens, qkv.shape[1] - 2 * keys.shape[0] * dim, qkv.dtype).view(tokens, -1, dim)
        rotation = None if rotary is None else step.rotations[rotary]
        self.launch(row_calls.rotary_store_call(qkv, q_norm, k_norm, eps, rotation, step.slots, queries, keys, values))
        return queries

    def attention(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
        step: StepContext,
    ) -> torch.Tensor:
        tokens, heads, dim = queries.shape
        out = self._empty(tokens, heads * dim, queries.dtype)
        for call in attention_calls(queries, keys, values, scale, window, step.attention, out.view(tokens, heads, dim)):
            self.launch(call)
        return out

    def logits(self, rows: torch.Tensor, weight: DenseMatrix) -> torch.Tensor:
        out = head_product(rows, weight.weight)
        if weight.offset is not None:
            self.launch(row_calls.finish_call(out, weight.offset, "identity"))
        return out

    def whole_vocabulary(self, logits: torch.Tensor, total: int) -> torch.Tensor:
        """The logits of each rank's part of the vocabulary [R, part] side by side → [R, total], on every rank."""
        widths = [part.size for part in even_parts(total, self.group.size)]
        room = max(widths) - logits.shape[1]
        every = self.group.all_gather(torch.nn.functional.pad(logits, (0, room)) if room else logits)
        return torch.cat([rows[:, :width] for rows, width in zip(every, widths, strict=True)], 1)

    def vectors(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.to(torch.float32)

    def pool(self, hidden: torch.Tensor, batch: RaggedBatch, rows: Rows, pooling: Pooling) -> torch.Tensor:
        """What the head gets (`table.Pooling`): hidden [T, H] → [R, H]."""
        first = {stop - 1: start for start, stop in zip(batch.query_starts, batch.query_starts[1:], strict=False)}
        out = self._empty(len(rows), hidden.shape[1], hidden.dtype)
        if pooling in ("row", "first"):
            picked = rows if pooling == "row" else [first[row] for row in rows.tolist()]
            torch.index_select(hidden, 0, as_tensor(picked, torch.int64, self.device), out=out)
            return out
        starts = as_tensor([first[row] for row in rows.tolist()], torch.int32, self.device)
        self.launch(row_calls.pool_call(hidden, starts, as_tensor(rows + 1, torch.int32, self.device), pooling, out))
        return out

    def _empty(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        return padded_empty(rows, width, dtype, self.device)
