"""The op table: what each op means. A model is written once against it, and an implementation is a module
(or object) that has all of these functions.

Ops are the only thing that touches activations: a model neither slices, adds nor reshapes what an op returned,
so that an implementation may record the calls of a step as a plan and replay it.

Letters in shapes: T tokens of the step, H hidden size, Q query heads, K key/value heads (Q is a multiple of K;
query head h reads key/value head h // (Q / K)), D head size, F width of the MLP, V vocabulary, R rows.
"Activations" are of one floating dtype, that of the weights. Sums of products and the softmax accumulate in
float32 whatever that dtype is; results are rounded to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from engine.kernels.batch import RaggedBatch


@dataclass(frozen=True, eq=False)
class RotaryFrequencies:
    """inverse: float32 [rotary_dim / 2], on the model's device. factor: multiplies cos and sin."""

    inverse: torch.Tensor
    factor: float


class Ops(Protocol):
    """One implementation of the table. A step object is its own affair: a model only passes it on."""

    def begin_step(
        self, batch: RaggedBatch, rotary: RotaryFrequencies, kv_heads: int, windows: tuple[int | None, ...]
    ) -> Any:
        """What all layers of a step share: rotary angles, and the layout of attention for each of `windows`.

        kv_heads: K, the same in all layers.
        windows: the distinct values of `window` that `attention` will be called with in this step.
        """
        ...

    def embedding(self, token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Rows of `weight` [V, H] for int64 token ids [T] → activations [T, H]."""
        ...

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, in] times the transpose of weight [out, in], plus bias [out] → activations [T, out]."""
        ...

    def rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + residual) normalised by its root mean square and scaled by weight [H]; and x + residual itself.

        x, residual: [T, H]; no residual counts as zeros. Returns (normed, new residual), both [T, H].
        """
        ...

    def rotary_store(
        self,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        keys: torch.Tensor,
        values: torch.Tensor,
        step: Any,
    ) -> torch.Tensor:
        """Split fused projections, rotate queries and keys, and write keys and values into the pool.

        qkv: [T, (Q + 2 K) D]: all query heads, then all key heads, then all value heads.
        q_norm, k_norm: [D] or both None: scale of an RMS norm of each head, applied before the rotation.
        keys, values: [slots, K, D], one layer's pool, written at the batch's `slots`.
        Of each head the first rotary_dim channels are rotated, channel i with channel i + rotary_dim / 2, by the
        angle position * inverse[i]; the others pass through. Returns the queries, [T, Q, D].
        """
        ...

    def attention(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
        step: Any,
    ) -> torch.Tensor:
        """Causal attention of the new tokens over their sequences' contexts in the pool.

        queries: [T, Q, D]; keys, values: [slots, K, D]. scale multiplies the scores before the softmax.
        window: a token sees itself and at most the window - 1 tokens before it; None: all before it.
        Returns [T, Q D], heads in order.
        """
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up, of gate_up [T, 2 F] whose first half is the gate → [T, F]."""
        ...

    def logits(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """rows [R, H] times the transpose of weight [V, H] → float32 [R, V], not rounded to the weights' dtype."""
        ...
