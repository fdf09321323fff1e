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
from engine.kernels.recorded import Activation, Mixture, Normed, Picked, Product, Rotary, Shared, Step, Stream
from engine.kernels.table import Activation as Function
from engine.kernels.table import MoeWeights, Pooling, RotaryFrequencies
from engine.parallel.group import ALONE, Group

WIDE = DTYPES[torch.float32]
NO_LIMIT = 1 << 62
PANEL = 32
"""Vectors are padded to this many entries (csrc/types.h)."""


@dataclass(eq=False)
class Recorder:
    """Records ops into `plan`. dtype: the weights'. kept: tensors whose memory the plan points to.

    picked: by dtype, the head's rows as far as they are recorded. routings: the plan's numbers for the routers, in
    order.
    """

    plan: _cpu.Plan
    dtype: torch.dtype
    kept: list[Any] = field(default_factory=list)
    buffers: dict[tuple[str, int, int, int], int] = field(default_factory=dict)
    picked: dict[int, Activation] = field(default_factory=dict)
    routings: list[int] = field(default_factory=list)
    in_head: bool = False
    group: Group = ALONE

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
    ) -> Step:
        made = []
        for number, rotary in enumerate(rotaries):
            half = len(rotary.inverse)
            cosines, sines = (self._buffer(f"{role} {number}", half, WIDE) for role in ("cosines", "sines"))
            self.plan.angles(self._address(rotary.inverse), half, rotary.factor, cosines, sines)
            made.append(Rotary(cosines, sines, half))
        return Step(tuple(made), causal)

    def embedding(self, token_ids: Any, weight: PackedMatrix, scale: float = 1.0, first: int = 0) -> Activation:
        out = self._embedded(weight.inputs)
        self.plan.embedding(weight.packed, out.buffer, scale, first, self._vocabulary(weight))
        return out

    def embedding_sum(
        self,
        batch: RaggedBatch,
        tokens: PackedMatrix,
        positions: PackedMatrix | None,
        types: PackedMatrix | None,
        first_position: int,
        first: int = 0,
    ) -> Activation:
        out = self._embedded(tokens.inputs)
        self.plan.embedding_sum(
            tokens.packed, None if positions is None else positions.packed, None if types is None else types.packed,
            first_position, out.buffer, first, self._vocabulary(tokens),
        )  # fmt: skip
        return out

    def _embedded(self, width: int) -> Activation:
        """Where embeddings go: to the residual stream, or to the part of it that this rank contributes."""
        alone = self.group.size == 1
        return Activation(self._buffer("residual", width, WIDE) if alone else self.plan.part(width), width)

    def _vocabulary(self, table: PackedMatrix) -> int:
        """Ids that steps may hold: with several ranks also those of others' rows, which the tokenizer has checked."""
        return table.outputs if self.group.size == 1 else NO_LIMIT

    def all_reduce(self, x: Activation | Product | Mixture) -> Activation | Product | Mixture | Shared:
        if self.group.size == 1:
            return x
        if isinstance(x, Product | Mixture):
            return Shared(x)
        total = Activation(self._buffer("residual", x.width, WIDE), x.width)
        self.plan.sum_parts(x.buffer, total.buffer, False)
        return total

    def linear(
        self,
        x: Activation | Stream | Normed | Product | Picked,
        weight: PackedMatrix,
        activation: Function = "identity",
    ) -> Product:
        return Product(self._settled(x), weight, activation)

    def gated_linear(
        self,
        x: Activation | Stream | Normed | Product | Picked,
        weight: PackedMatrix,
        activation: Function = "silu",
    ) -> Activation:
        source = self._settled(x)
        out = Activation(self._buffer("gated", weight.outputs // 2, self.narrow), weight.outputs // 2)
        self.plan.linear(source.buffer, weight.packed, out.buffer, "gate", self.in_head, activation)
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
            return Mixture(hidden, outputs, -1, -1, routing)
        shared, gate = self._buffer("shared expert", hidden, WIDE), self._buffer("shared gate", 1, WIDE)
        plan.linear(rows.buffer, weights.shared.gate.packed, gate, "store", False)
        inner = self.gated_linear(rows, weights.shared.gate_up)
        plan.linear(inner.buffer, weights.shared.down.packed, shared, "store", False)
        return Mixture(hidden, outputs, shared, gate, routing)

    def rms_norm(
        self,
        x: Activation | Product | Mixture | Shared | Normed,
        residual: Activation | None,
        weight: torch.Tensor,
        eps: float,
    ) -> tuple[Normed, Activation]:
        if isinstance(x, Normed):
            if residual is None:
                raise TypeError("the norm of a branch is normed only together with the residual stream")
            self.plan.add_norm(x.source.buffer, self._address(x.weight), x.eps, residual.buffer)
            return Normed(residual, weight, eps), residual
        if residual is None and (isinstance(x, Product) or (isinstance(x, Shared) and isinstance(x.own, Product))):
            branch = self._stored(x, "branch", WIDE)
            return Normed(branch, weight, eps), branch
        if isinstance(x, Product | Mixture | Shared):
            if residual is None:
                raise TypeError("experts' outputs are normed only together with the residual stream")
            return Normed(self._added(x, residual), weight, eps), residual
        if residual is not None:
            raise TypeError("only a product, or the norm of one, can be added to the residual stream")
        return Normed(x, weight, eps), x

    def layer_norm(
        self,
        x: Activation | Product | Shared,
        residual: Activation | Stream | None,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
    ) -> Stream:
        total = residual.wide if isinstance(residual, Stream) else residual
        if isinstance(x, Product | Shared):
            total = self._stored(x, "residual", WIDE) if total is None else self._added(x, total)
        elif total is not None:
            raise TypeError("only a product can be added to the residual stream")
        else:
            total = x
        narrow = total
        if self.narrow != WIDE:
            narrow = Activation(self._buffer("normed", total.width, self.narrow), total.width)
        self.plan.layer_norm(
            total.buffer, self._address(weight), self._address(bias), eps, total.buffer,
            None if narrow is total else narrow.buffer,
        )  # fmt: skip
        return Stream(total, narrow)

    def rotary_store(
        self,
        qkv: Product,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        keys: torch.Tensor,
        values: torch.Tensor,
        rotary: int | None,
        step: Step,
    ) -> Activation:
        kv_heads, _, head_dim = keys.shape
        heads = qkv.weight.outputs // head_dim - 2 * kv_heads
        projections = self._stored(qkv, "qkv", WIDE)
        # Products with a pool of another type than bfloat16 are computed in float32.
        kind = self.narrow if keys.dtype == self.dtype else WIDE
        padded = -(-head_dim // PANEL) * PANEL
        queries = Activation(self._buffer("queries", heads * padded, kind), heads * padded)
        norms = [0 if norm is None else self._address(norm) for norm in (q_norm, k_norm)]
        turn = Rotary(None, None, 0) if rotary is None else step.rotaries[rotary]
        self.plan.rotary_store(
            projections.buffer, turn.cosines, turn.sines, queries.buffer, norms[0], norms[1], eps,
            *self._pool(keys, values), heads, kv_heads, head_dim, turn.half,
        )  # fmt: skip
        return queries

    def attention(
        self,
        queries: Activation,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
        step: Step,
    ) -> Activation:
        kv_heads, _, head_dim = keys.shape
        heads = queries.width // (-(-head_dim // PANEL) * PANEL)
        out = Activation(self._buffer("attended", heads * head_dim, self.narrow), heads * head_dim)
        self.plan.attention(
            queries.buffer, *self._pool(keys, values), out.buffer, scale, heads, kv_heads, head_dim, window or 0,
            step.causal,
        )  # fmt: skip
        return out

    def begin_head(self, hidden: Normed | Stream | Activation, pooling: Pooling) -> Picked:
        """What the head is to be called with. A norm is computed of picked rows only, unless they are pooled."""
        source = hidden.wide if isinstance(hidden, Stream) else hidden
        if isinstance(source, Normed) and pooling in ("mean", "max"):
            source = self._settled(source, "hidden", WIDE)
        self.plan.begin_head(pooling)
        self.in_head = True
        return Picked(source)

    def logits(self, rows: Activation | Product | Picked, weight: PackedMatrix) -> Activation:
        return self._stored(Product(self._settled(rows), weight, "identity"), "logits", WIDE)

    def vectors(self, rows: Product | Picked) -> Activation:
        return self._stored(rows, "vectors", WIDE) if isinstance(rows, Product) else self._rows(rows, WIDE)

    def _settled(
        self, x: Activation | Stream | Normed | Product | Picked, role: str = "normed", dtype: int | None = None
    ) -> Activation:
        """Record what `x` names, for all rows, as products want it (or as `dtype`)."""
        dtype = self.narrow if dtype is None else dtype
        match x:
            case Activation():
                return x
            case Stream():
                return x.narrow
            case Picked():
                return self._rows(x, dtype)
            case Product():
                return self._stored(x, "inner", dtype)
            case Normed():
                out = Activation(self._buffer(role, x.source.width, dtype), x.source.width)
                self.plan.norm(x.source.buffer, self._address(x.weight), x.eps, out.buffer, False)
                return out

    def _stored(self, x: Product | Shared, role: str, dtype: int) -> Activation:
        """Record a product into the buffer of a role, or of another where that is what the product reads."""
        if isinstance(x, Shared):
            part = self._part(x.own)
            total = Activation(self._buffer(role, part.width, dtype), part.width)
            self.plan.sum_parts(part.buffer, total.buffer, False)
            return total
        out = self._buffer(role, x.weight.outputs, dtype)
        if out == x.source.buffer:
            out = self._buffer(f"{role} of {role}", x.weight.outputs, dtype)
        self.plan.linear(x.source.buffer, x.weight.packed, out, "store", self.in_head, x.activation)
        return Activation(out, x.weight.outputs)

    def _part(self, own: Product | Mixture) -> Activation:
        """Record what this rank contributes to a sum."""
        width = own.width if isinstance(own, Mixture) else own.weight.outputs
        part = Activation(self.plan.part(width), width)
        if isinstance(own, Mixture):
            self.plan.combine(own.outputs, own.shared, own.shared_gate, part.buffer, own.routing, afresh=True)
        else:
            self.plan.linear(own.source.buffer, own.weight.packed, part.buffer, "store", False, own.activation)
        return part

    def _added(self, x: Product | Mixture | Shared, residual: Activation) -> Activation:
        if isinstance(x, Shared):
            self.plan.sum_parts(self._part(x.own).buffer, residual.buffer, True)
            return residual
        if isinstance(x, Mixture):
            self.plan.combine(x.outputs, x.shared, x.shared_gate, residual.buffer, x.routing)
            return residual
        if x.activation != "identity":
            raise TypeError(f"a product with the activation {x.activation} is not added to the residual stream")
        self.plan.linear(x.source.buffer, x.weight.packed, residual.buffer, "add", False)
        return residual

    def _rows(self, rows: Picked, dtype: int) -> Activation:
        """The head's rows in a dtype."""
        if dtype in self.picked:
            return self.picked[dtype]
        source = rows.source
        width = source.source.width if isinstance(source, Normed) else source.width
        out = Activation(self._buffer("picked", width, dtype), width)
        if isinstance(source, Normed):
            self.plan.norm(source.source.buffer, self._address(source.weight), source.eps, out.buffer, True)
        elif dtype == WIDE:
            self.plan.pool(source.buffer, out.buffer)
        else:
            self.plan.narrow(self._rows(rows, WIDE).buffer, out.buffer)
        self.picked[dtype] = out
        return out

    def _buffer(self, role: str, width: int, dtype: int, rows_each: int = 1) -> int:
        """The buffer of a role: layers follow one another and share them. Those of a head are its own.

        rows_each: rows for each token.
        """
        key = (f"{role} of the head" if self.in_head else role, width, dtype, rows_each)
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
