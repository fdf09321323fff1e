"""The cpu backend: packed weights, and programs that are plans of csrc, replayed by one call a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from engine.kernels import _cpu
from engine.kernels.batch import RaggedBatch
from engine.kernels.exchange_group import ExchangeGroup, lost
from engine.kernels.kv_cache import KvCache
from engine.kernels.packed import PackedMatrix, packed_matrix
from engine.kernels.record import PANEL, WIDE, Recorder
from engine.kernels.table import Doubles, Floats, Integers, Logprobs, Longs, Ops, Pooling, Rows
from engine.parallel.group import ALONE, Group

EMPTY = RaggedBatch(
    token_ids=torch.zeros(1, dtype=torch.int64),
    positions=torch.zeros(1, dtype=torch.int64),
    slots=torch.zeros(1, dtype=torch.int64),
    query_starts=(0, 1),
    context_lengths=(1,),
    context_slots=torch.zeros(1, dtype=torch.int64),
    context_starts=(0, 1),
)
"""What a model's step is recorded with: of a batch it only passes on what ops take."""


@dataclass(slots=True)
class PlanProgram:
    """A recorded plan. recorder: keeps alive what the plan points to. made_buffer: where what the head makes is.

    given_buffer: what the head was given. given: how many rows of it.
    """

    plan: _cpu.Plan
    recorder: Recorder
    made_buffer: int
    given_buffer: int
    given: int = 0

    def run(self, batch: RaggedBatch, rows: Rows, keep: Longs | None = None) -> torch.Tensor:
        with lost():
            self._run(batch, rows)
        return self._made(len(rows))

    def _run(self, batch: RaggedBatch, rows: Rows) -> None:
        self.plan.run(
            batch.token_ids.numpy(),
            batch.positions.numpy(),
            batch.slots.numpy(),
            np.array(batch.query_starts, np.int64),
            np.array(batch.context_starts, np.int64),
            batch.context_slots.numpy(),
            rows,
            None if batch.type_ids is None else batch.type_ids.numpy(),
        )

    def logits(self, rows: Rows, keep: Longs | None = None) -> torch.Tensor:
        self.plan.run_head(rows)
        return self._made(len(rows))

    def pooled(self) -> torch.Tensor:
        return torch.from_numpy(self.plan.read(self.given_buffer, self.given))

    def _made(self, rows: int) -> torch.Tensor:
        self.given = rows
        return torch.from_numpy(self.plan.view(self.made_buffer, rows))

    def routing(self) -> list[Integers]:
        return [self.plan.routed(routing) for routing in self.recorder.routings]

    def set_profiling(self, on: bool) -> None:
        self.plan.set_profiling(on)

    def take_profile(self) -> dict[str, float]:
        return self.plan.take_profile()


@dataclass(frozen=True, eq=False)
class CpuBackend:
    """Kernels of one instruction set, worked by one team of threads. arena: where weights are allocated."""

    isa: str
    team: _cpu.Team
    sampling: _cpu.Sampling
    arena: _cpu.Arena
    exchange: _cpu.Exchange | None = None

    @property
    def group(self) -> Group:
        return ALONE if self.exchange is None else ExchangeGroup(self.exchange)

    @property
    def name(self) -> str:
        return f"cpu ({self.isa}, {self.team.threads} threads)"

    @property
    def prefill_chunk(self) -> int:
        # Reading a weight takes as long as multiplying it for some 250 tokens with AMX, for 15 without.
        return 1024 if self.isa == "amx" else 256

    def matrix(
        self, outputs: int, inputs: int, dtype: torch.dtype, *, bias: bool = False, gated: bool = False
    ) -> PackedMatrix:
        return packed_matrix(outputs, inputs, dtype, bias=bias, gated=gated, arena=self.arena)

    def vector(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(-(-size // PANEL) * PANEL, dtype=torch.float32)

    def compile(
        self,
        step: Callable[[Ops, RaggedBatch, KvCache], Any],
        head: Callable[[Ops, Any], Any],
        cache: KvCache,
        dtype: torch.dtype,
        pooling: Pooling = "row",
    ) -> PlanProgram:
        plan = _cpu.Plan(self.team, self.isa, self.exchange)
        recorder = Recorder(plan, dtype, group=self.group)
        ops = cast(Ops, recorder)
        made = head(ops, recorder.begin_head(step(ops, EMPTY, cache), pooling))
        given = recorder.picked.get(WIDE) or recorder.picked[recorder.narrow]
        return PlanProgram(plan, recorder, made.buffer, given.buffer)

    def best(self, logits: torch.Tensor) -> tuple[Longs, Floats]:
        ids, peaks = np.empty(len(logits), np.int64), np.empty(len(logits), np.float32)
        self.sampling.best(logits.numpy(), ids, peaks)
        return ids, peaks

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
        drawn = np.empty(len(rows), np.int64)
        self.sampling.draw(logits.numpy(), rows, temperatures, top_ks, top_ps, min_ps, uniforms, drawn)
        return drawn

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
        top = int(tops.sum())
        found = Logprobs(
            tokens=np.empty(len(rows), np.float32),
            top_ids=np.empty(top, np.int64),
            tops=np.empty(top, np.float32),
            ids=np.empty(len(ids), np.float32),
        )
        self.sampling.logprobs(logits.numpy(), rows, temperatures, tokens, tops, id_counts, ids, *found)
        return found


def open_cpu_backend(isa: str, cores: list[int], threads: int, exchange: _cpu.Exchange | None = None) -> CpuBackend:
    """Start the team. cores: where its threads are pinned as far as there is one for each. exchange: with the other
    ranks, if there are any.

    Raises ValueError for an ISA that this machine cannot run.
    """
    team = _cpu.Team(threads, cores if threads <= len(cores) else [])
    return CpuBackend(isa, team, _cpu.Sampling(team, isa), _cpu.Arena(), exchange)  # refuses what cannot be run
