"""The backend on a device: plain weights there, and programs that launch the model's ops at each step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from engine.kernels.batch import RaggedBatch
from engine.kernels.dense import DenseMatrix
from engine.kernels.gpu import sampling
from engine.kernels.gpu.errors import device_errors
from engine.kernels.gpu.graphs import Captured, DecodeGraphs, capture_decodes, ladder
from engine.kernels.gpu.launch import as_tensor
from engine.kernels.gpu.machine import Machine, open_machine
from engine.kernels.gpu.ops import GpuOps
from engine.kernels.gpu.products import gpu_matrix, make_products_exact
from engine.kernels.gpu.queueing import fed, sample_queued
from engine.kernels.gpu.ring import Ring
from engine.kernels.kv_cache import KvCache
from engine.kernels.queued import Draws, Outcome, Scores
from engine.kernels.table import Doubles, Floats, Integers, Logprobs, Longs, Ops, Pooling, Rows
from engine.parallel.division import Part
from engine.parallel.group import ALONE, DeviceGroup


@dataclass(slots=True)
class GpuProgram:
    """batch, hidden: of the last step, hidden states on the device. rows: what the head was last given. last: what
    the step queued last has sampled, int64 on the device. graphs: of decodes, once they are captured. ring: for what
    steps copy."""

    step: Callable[[Ops, RaggedBatch, KvCache], Any]
    head: Callable[[Ops, Any], Any]
    cache: KvCache
    ops: GpuOps
    machine: Machine
    ring: Ring
    pooling: Pooling = "row"
    graphs: DecodeGraphs | None = None
    batch: RaggedBatch | None = None
    hidden: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    last: torch.Tensor | None = None

    @device_errors()
    @torch.inference_mode()
    def run(self, batch: RaggedBatch, rows: Rows, keep: Longs | None = None) -> torch.Tensor:
        """Queues the step and its head; nothing waits for the GPU."""
        found = self._replayed(batch, rows, np.full(batch.num_tokens, -1))
        return self._launched(on_device(batch, self.ops.device), rows) if found is None else found

    def _replayed(self, batch: RaggedBatch, rows: Rows, sources: Longs) -> torch.Tensor | None:
        """The logits of a step that there is a graph for."""
        if self.graphs is None:
            return None
        graph = self.graphs.replay(batch, rows, sources)
        if graph is None:
            return None
        count = batch.num_sequences
        self.batch, self.hidden = batch, self.graphs.hidden[:count]
        self.rows, self.ops.routed = self.hidden, [ids[:count] for ids in graph.routed]
        return self.graphs.logits[:count]

    def _launched(self, batch: RaggedBatch, rows: Rows) -> torch.Tensor:
        """Those of a step on the device, launched kernel by kernel."""
        self.ops.routed = []
        self.batch = batch
        self.hidden = self.step(cast(Ops, self.ops), batch, self.cache)
        return self.logits(rows)

    @device_errors()
    @torch.inference_mode()
    def logits(self, rows: Rows, keep: Longs | None = None) -> torch.Tensor:
        """Queues the head; nothing waits."""
        assert self.hidden is not None and self.batch is not None, "logits are asked for before a step was run"
        self.rows = self.ops.pool(self.hidden, self.batch, rows, self.pooling)
        result: torch.Tensor = self.head(cast(Ops, self.ops), self.rows)
        return result

    @device_errors()
    @torch.inference_mode()
    def queue(
        self, batch: RaggedBatch, rows: Rows, sources: Longs, draws: Draws | None, scores: Scores | None
    ) -> Callable[[], Outcome]:
        """See `engine.kernels.queued`."""
        logits = self._replayed(batch, rows, sources)
        if logits is None:
            logits = self._launched(fed(on_device(batch, self.ops.device), sources, self.last), rows)
        tokens, outcome = sample_queued(logits, draws, scores, self.ring)
        if self.ops.group.size > 1:  # all go on with what rank 0 has sampled
            tokens = self.ops.group.all_gather(tokens)[0]
        self.last = tokens
        if self.graphs is not None:
            self.last = self.graphs.sampled
            self.last[: len(tokens)].copy_(tokens)
        return outcome

    @device_errors()
    @torch.inference_mode()
    def capture(
        self, most: int, running: int, longest: int, beat: Callable[[], None] = lambda: None
    ) -> tuple[int, ...]:
        """See `engine.kernels.queued.CapturingProgram`."""
        if not self.machine.has_graphs:
            return ()
        model = Captured(self.step, self.head, self.cache, self.ops)
        self.graphs = capture_decodes(model, self.machine, Ring(self.machine), ladder(most), running, longest, beat)
        return () if self.graphs is None else self.graphs.sizes

    def pooled(self) -> torch.Tensor:
        assert self.rows is not None, "pooled rows are asked for before a step was run"
        return self.rows.to(torch.float32)

    @device_errors()
    def routing(self) -> list[Integers]:
        """Waits for the step."""
        return [ids.cpu().numpy().astype(np.int32) for ids in self.ops.routed]

    def set_profiling(self, on: bool) -> None:
        pass

    def take_profile(self) -> dict[str, float]:
        return {}


def on_device(batch: RaggedBatch, device: torch.device) -> RaggedBatch:
    """The same batch with its tensors there; copied without waiting."""
    if batch.token_ids.device.type == device.type:
        return batch

    def there(tensor: torch.Tensor) -> torch.Tensor:
        return as_tensor(tensor, tensor.dtype, device)

    return dataclasses.replace(
        batch,
        token_ids=there(batch.token_ids),
        positions=there(batch.positions),
        slots=there(batch.slots),
        context_slots=there(batch.context_slots),
        type_ids=None if batch.type_ids is None else there(batch.type_ids),
    )


@dataclass(frozen=True)
class GpuBackend:
    """Kernels on one device: a GPU, or in tests the CPU, where Triton's interpreter runs them."""

    device: torch.device
    machine: Machine
    group: DeviceGroup = ALONE

    @property
    def name(self) -> str:
        if self.device.type == "cuda":
            return f"triton ({torch.cuda.get_device_name(self.device)})"
        return f"triton ({self.device})"

    @property
    def prefill_chunk(self) -> int:
        # Sixteen blocks of rows: products then cost several times what reading the weights does.
        return 2048

    def matrix(
        self, outputs: int, inputs: int, dtype: torch.dtype, *, bias: bool = False, gated: bool = False
    ) -> DenseMatrix:
        return gpu_matrix(outputs, inputs, dtype, self.device, bias=bias)

    def vector(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=self.device)

    def compile(
        self,
        step: Callable[[Ops, RaggedBatch, KvCache], Any],
        head: Callable[[Ops, Any], Any],
        cache: KvCache,
        dtype: torch.dtype,
        pooling: Pooling = "row",
    ) -> GpuProgram:
        ops = GpuOps(self.device, group=self.group)
        return GpuProgram(step, head, cache, ops, self.machine, Ring(self.machine), pooling)

    def joined_head(self, head: Callable[[Ops, Any], Any], part: Part) -> Callable[[Ops, Any], Any]:
        """See `engine.kernels.vocabulary.JoinsHeads`."""

        def whole(ops: Ops, rows: Any) -> Any:
            return cast(GpuOps, ops).whole_vocabulary(head(ops, rows), part.total)

        return whole

    @device_errors()
    def best(self, logits: torch.Tensor) -> tuple[Longs, Floats]:
        return sampling.best(self._here(logits))

    @device_errors()
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
        return sampling.draw(self._here(logits), rows, temperatures, top_ks, top_ps, min_ps, uniforms)

    @device_errors()
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
        return sampling.logprobs(self._here(logits), rows, temperatures, tokens, tops, id_counts, ids)

    def _here(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.to(self.device)


def open_gpu_backend(device: torch.device | str, group: DeviceGroup = ALONE) -> GpuBackend:
    """The backend on "cuda" or "cuda:N", which becomes the process's current device, or on "cpu" (interpreted).

    Raises RuntimeError where torch cannot use that GPU.
    """
    chosen = torch.device(device)
    make_products_exact()
    if chosen.type == "cuda":
        if chosen.index is None:
            chosen = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(chosen)
    return GpuBackend(chosen, open_machine(chosen), group)
