"""The backend of the reference ops: plain tensors, and a program that calls the model's functions at each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from engine.kernels import reference, reference_sampling
from engine.kernels.batch import RaggedBatch
from engine.kernels.dense import DenseMatrix
from engine.kernels.kv_cache import KvCache
from engine.kernels.table import Doubles, Floats, Logprobs, Longs, Ops, Rows


@dataclass(slots=True)
class EagerProgram:
    """hidden: what the last step returned."""

    step: Callable[[Ops, RaggedBatch, KvCache], Any]
    head: Callable[[Ops, Any], Any]
    cache: KvCache
    hidden: torch.Tensor | None = None

    @torch.inference_mode()
    def run(self, batch: RaggedBatch, rows: Rows) -> torch.Tensor:
        self.hidden = self.step(reference, batch, self.cache)
        return self.logits(rows)

    @torch.inference_mode()
    def logits(self, rows: Rows) -> torch.Tensor:
        assert self.hidden is not None, "logits are asked for before a step was run"
        result: torch.Tensor = self.head(reference, self.hidden[torch.from_numpy(rows)])
        return result


@dataclass(frozen=True)
class EagerBackend:
    """Allocates plain tensors on the CPU."""

    name: str = "reference"
    prefill_chunk: int = 512

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
    ) -> EagerProgram:
        return EagerProgram(step, head, cache)

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
