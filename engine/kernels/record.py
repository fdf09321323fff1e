"""Ops that record: a model's functions are called once with names in place of activations, and what they call becomes
a plan of csrc, its weights and buffers resolved.

Recording fuses what would cost a pass over memory: the product before a norm is added straight to the residual stream,
which stays in float32, and norms are computed only for the rows and where they are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from engine.kernels import _cpu
from engine.kernels.batch import RaggedBatch
from engine.kernels.packed import DTYPES, PackedMatrix
from engine.kernels.table import Activation as Function
from engine.kernels.table import MoeWeights, RotaryFrequencies

WIDE = DTYPES[torch.float32]
PANEL = 32
"""Vectors are padded to this many entries (csrc/types.h)."""


@dataclass(frozen=True)
class Activation:
    """A buffer of the plan, of `width` channels."""

    buffer: int
    width: int


@dataclass(frozen=True, eq=False)
class Product:
    """A product that is not recorded yet: where it goes depends on who takes it."""

    source: Activation
    weight: PackedMatrix


@dataclass(frozen=True)
class Mixture:
    """Buffers of experts' outputs that are not added up yet; shared, shared_gate: -1 where there is none."""

    outputs: int
    shared: int
    shared_gate: int
    routing: int


@dataclass(frozen=True, eq=False)
class Normed:
    """A norm of float32 rows that is not recorded yet: of which rows depends on who takes it."""

    source: Activation
    weight: torch.Tensor
    eps: float


@dataclass(frozen=True)
class Rotary:
    """The buffers of a step's cosines and sines, each of `half` channels."""

    cosines: int
    sines: int
    half: int


@dataclass(eq=False)
class Recorder:
    """Records ops into `plan`. dtype: the weights'. kept: tensors whose memory the plan points to. routings: the plan's
    numbers for the routers, in order."""

    plan: _cpu.Plan
    dtype: torch.dtype
    kept: list[Any] = field(default_factory=list)
    buffers: dict[tuple[str, int, int, int], int] = field(default_factory=dict)
    routings: list[int] = field(default_factory=list)

    @property
    def narrow(self) -> int:
        """The type of inputs of products: that of bfloat16 weights, else float32."""
        return DTYPES[torch.bfloat16] if self.dtype == torch.bfloat16 else WIDE

    def begin_step(
        self,
        batch: RaggedBatch,
        rotaries: tuple[RotaryFrequencies, ...],
        kv_heads: int,
        windows: tuple[int | None, ...],
        *,
        causal: bool = True,
    ) -> Rotary:
        (rotary,) = rotaries
        half = len(rotary.inverse)
        step = Rotary(self._buffer("cosines", half, WIDE), self._buffer("sines", half, WIDE), half)
        self.plan.angles(self._address(rotary.inverse), half, rotary.factor, step.cosines, step.sines)
        return step

    def embedding(self, token_ids: Any, weight: PackedMatrix, scale: float = 1.0) -> Activation:
        out = Activation(self._buffer("residual", weight.inputs, WIDE), weight.inputs)
        self.plan.embedding(weight.packed, out.buffer)
        return out

    def linear(self, x: Activation | Normed, weight: PackedMatrix, activation: Function = "identity") -> Product:
        return Product(self._settled(x), weight)

    def gated_linear(self, x: Activation | Normed, weight: PackedMatrix, activation: Function = "silu") -> Activation:
        out = Activation(self._buffer("gated", weight.outputs // 2, self.narrow), weight.outputs // 2)
        self.plan.linear(self._settled(x).buffer, weight.packed, out.buffer, "gate", False)
        return out

    def moe(self, x: Activation | Normed, weights: MoeWeights) -> Mixture:
        plan, rows, top_k = self.plan, self._settled(x), weights.top_k
        experts, hidden, width = weights.router.outputs, weights.router.inputs, weights.downs[0].inputs
        logits = self._buffer("router", experts, WIDE)
        plan.linear(rows.buffer, weights.router.packed, logits, "store", False)
        routing = plan.routing(experts, top_k)
        self.routings.append(routing)
        plan.route(logits, routing, weights.normalise)
        gated = self._buffer("experts' gated", width, self.narrow, top_k)
        plan.experts(rows.buffer, tuple(one.packed for one in weights.gate_ups), gated, routing)
        outputs = self._buffer("experts' outputs", hidden, WIDE, top_k)
        plan.experts(gated, tuple(one.packed for one in weights.downs), outputs, routing)
        if weights.shared is None:
            return Mixture(outputs, -1, -1, routing)
        shared, gate = self._buffer("shared expert", hidden, WIDE), self._buffer("shared gate", 1, WIDE)
        plan.linear(rows.buffer, weights.shared.gate.packed, gate, "store", False)
        inner = self.gated_linear(rows, weights.shared.gate_up)
        plan.linear(inner.buffer, weights.shared.down.packed, shared, "store", False)
        return Mixture(outputs, shared, gate, routing)

    def rms_norm(
        self, x: Activation | Product | Mixture, residual: Activation | None, weight: torch.Tensor, eps: float
    ) -> tuple[Normed, Activation]:
        if isinstance(x, Product | Mixture):
            if residual is None:
                raise TypeError("a product is normed only together with the residual stream that it is added to")
            self._add(x, residual)
            return Normed(residual, weight, eps), residual
        if residual is not None:
            raise TypeError("only a product can be added to the residual stream")
        return Normed(x, weight, eps), x

    def rotary_store(
        self,
        qkv: Product,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        keys: torch.Tensor,
        values: torch.Tensor,
        rotary: int | None,
        step: Rotary,
    ) -> Activation:
        kv_heads, _, head_dim = keys.shape
        heads = qkv.weight.outputs // head_dim - 2 * kv_heads
        projections = self._buffer("qkv", qkv.weight.outputs, WIDE)
        self.plan.linear(qkv.source.buffer, qkv.weight.packed, projections, "store", False)
        # Products with a pool of another type than bfloat16 are computed in float32.
        kind = self.narrow if keys.dtype == self.dtype else WIDE
        padded = -(-head_dim // PANEL) * PANEL
        queries = Activation(self._buffer("queries", heads * padded, kind), heads * padded)
        norms = [0 if norm is None else self._address(norm) for norm in (q_norm, k_norm)]
        self.plan.rotary_store(
            projections, step.cosines, step.sines, queries.buffer, norms[0], norms[1], eps,
            *self._pool(keys, values), heads, kv_heads, head_dim, step.half,
        )  # fmt: skip
        return queries

    def attention(
        self,
        queries: Activation,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
        step: Rotary,
    ) -> Activation:
        kv_heads, _, head_dim = keys.shape
        heads = queries.width // (-(-head_dim // PANEL) * PANEL)
        out = Activation(self._buffer("attended", heads * head_dim, self.narrow), heads * head_dim)
        self.plan.attention(
            queries.buffer, *self._pool(keys, values), out.buffer, scale, heads, kv_heads, head_dim, window or 0
        )
        return out

    def logits(self, rows: Normed, weight: PackedMatrix) -> Activation:
        self.plan.begin_head()
        picked = self._buffer("picked", rows.source.width, self.narrow)
        self.plan.norm(rows.source.buffer, self._address(rows.weight), rows.eps, picked, True)
        out = Activation(self._buffer("logits", weight.outputs, WIDE), weight.outputs)
        self.plan.linear(picked, weight.packed, out.buffer, "store", True)
        return out

    def _add(self, x: Product | Mixture, residual: Activation) -> None:
        if isinstance(x, Product):
            self.plan.linear(x.source.buffer, x.weight.packed, residual.buffer, "add", False)
        else:
            self.plan.combine(x.outputs, x.shared, x.shared_gate, residual.buffer, x.routing)

    def _settled(self, x: Activation | Normed) -> Activation:
        """Record a norm for all rows, if that is what `x` is."""
        if isinstance(x, Activation):
            return x
        out = Activation(self._buffer("normed", x.source.width, self.narrow), x.source.width)
        self.plan.norm(x.source.buffer, self._address(x.weight), x.eps, out.buffer, False)
        return out

    def _buffer(self, role: str, width: int, dtype: int, rows_each: int = 1) -> int:
        """The buffer of a role: layers follow one another and share them. rows_each: rows for each token."""
        key = (role, width, dtype, rows_each)
        if key not in self.buffers:
            self.buffers[key] = self.plan.buffer(width, dtype, rows_each)
        return self.buffers[key]

    def _address(self, tensor: torch.Tensor) -> int:
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _pool(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[int, int, int, int, int]:
        head_stride, slot_stride, _ = keys.stride()
        size = keys.dtype.itemsize
        return (
            self._address(keys), self._address(values), DTYPES[keys.dtype], slot_stride * size, head_stride * size
        )  # fmt: skip
