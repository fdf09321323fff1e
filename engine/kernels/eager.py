"""The backend of the reference ops: plain tensors, and a program that calls the model's functions at each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch

from engine.kernels import reference, reference_sampling
from engine.kernels.batch import RaggedBatch
from engine.kernels.dense import DenseMatrix
from engine.kernels.kv_cache import KvCache
from engine.kernels.table import Doubles, Floats, Integers, Logprobs, Longs, MoeWeights, Ops, Pooling, Rows
from engine.parallel.group import ALONE, Group


@dataclass(slots=True)
class RoutedOps:
    """The reference ops among the ranks of a group, and in `routed` what each mixture of experts of a step has chosen:
    int64 [T, top_k]."""

    group: Group = ALONE
    routed: list[torch.Tensor] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self.group.all_reduce(x)

    def moe(self, x: torch.Tensor, weights: MoeWeights) -> torch.Tensor:
        ids, shares = reference.route(x, weights)
        self.routed.append(ids)
        return reference.mixture(x, weights, ids, shares)


@dataclass(slots=True)
class EagerProgram:
    """batch, hidden, routed: of the last step. rows: what the head was last given."""

    step: Callable[[Ops, RaggedBatch, KvCache], Any]
    head: Callable[[Ops, Any], Any]
    cache: KvCache
    pooling: Pooling = "row"
    group: Group = ALONE
    batch: RaggedBatch | None = None
    hidden: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    routed: list[torch.Tensor] = field(default_factory=list)

    @torch.inference_mode()
    def run(self, batch: RaggedBatch, rows: Rows, keep: Longs | None = None) -> torch.Tensor:
        ops = RoutedOps(self.group)
        self.batch, self.hidden = batch, self.step(cast(Ops, ops), batch, self.cache)
        self.routed = ops.routed
        return self.logits(rows)

    @torch.inference_mode()
    def logits(self, rows: Rows, keep: Longs | None = None) -> torch.Tensor:
        assert self.hidden is not None and self.batch is not None, "logits are asked for before a step was run"
        self.rows = reference.pool(self.hidden, self.batch, torch.from_numpy(rows), self.pooling)
        result: torch.Tensor = self.head(reference, self.rows)
        return result

    def pooled(self) -> torch.Tensor:
        assert self.rows is not None, "pooled rows are asked for before a step was run"
        return self.rows.to(torch.float32)

    def routing(self) -> list[Integers]:
        return [ids.numpy().astype(np.int32) for ids in self.routed]

    def set_profiling(self, on: bool) -> None:
        pass

    def take_profile(self) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class EagerBackend:
    """Allocates plain tensors on the CPU."""

    name: str = "reference"
    prefill_chunk: int = 512
    group: Group = ALONE

    def matrix(
        self, outputs: int, inputs: int, dtype: torch.dtype, *, bias: bool = False, gated: bool = False
    ) -> DenseMatrix:
        weight = torch.empty((outputs, inputs), dtype=dtype)
        return DenseMatrix(weight, torch.empty(outputs, dtype=dtype) if bias else None)

    def vector(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype)

    def compile(
        self,
        step: Callable[[Ops, RaggedBatch, KvCache], Any],
        head: Callable[[Ops, Any], Any],
        cache: KvCache,
        dtype: torch.dtype,
        pooling: Pooling = "row",
    ) -> EagerProgram:
        return EagerProgram(step, head, cache, pooling, self.group)

    def best(self, logits: torch.Tensor) -> tuple[Longs, Floats]:
        return reference_sampling.best(logits)

    def draw(
        self,
        logits: torch.Tensor,
        rows: Longs,
        temperatures: Doubles,
        top_ks: Longs,
        top_ps: Doubles,
        min_ps: Doubles,
        uniforms: Doubles,
    ) -> Longs:
        return reference_sampling.draw(logits, rows, temperatures, top_ks, top_ps, min_ps, uniforms)

    def logprobs(
        self,
        logits: torch.Tensor,
        rows: Longs,
        temperatures: Doubles,
        tokens: Longs,
        tops: Longs,
        id_counts: Longs,
        ids: Longs,
    ) -> Logprobs:
        return reference_sampling.logprobs(logits, rows, temperatures, tokens, tops, id_counts, ids)
