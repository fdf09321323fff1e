"""Plans of one op: inputs in, the op run by the team that all tests share, outputs out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from backends import BFLOAT16_ISAS, ISAS, backend

from engine.kernels import _cpu, reference
from engine.kernels.batch import RaggedBatch, offsets
from engine.kernels.cpu import CpuBackend
from engine.kernels.dense import DenseMatrix
from engine.kernels.packed import DTYPES, PackedMatrix
from engine.kernels.record import PANEL

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
KINDS = [*[(isa, F32) for isa in ISAS], *[(isa, F16) for isa in ISAS], *[(isa, BF16) for isa in BFLOAT16_ISAS]]
"""Every kernel of products there is: an ISA and the dtype of weights."""
BFLOAT16_STEP = 2.0**-8
"""Largest relative error of a rounding to bfloat16."""
FLOAT32_STEP = 2.0**-24


def kind_id(value: object) -> str:
    return str(value).removeprefix("torch.")


def team(isa: str, threads: int = 2) -> _cpu.Team:
    found = backend(isa, threads)
    assert isinstance(found, CpuBackend)
    return found.team


def random(seed: int, *shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed % 2**63)).to(dtype)


def narrow_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a product wants its input, for weights of `dtype`."""
    return BF16 if dtype == BF16 else F32


def packed(weight: torch.Tensor, bias: torch.Tensor | None = None, *, gated: bool = False) -> PackedMatrix:
    matrix = backend(ISAS[0]).matrix(*weight.shape, weight.dtype, bias=bias is not None, gated=gated)
    assert isinstance(matrix, PackedMatrix)
    matrix.rows(0, len(weight)).write(0, weight)
    if bias is not None:
        matrix.bias(0, len(weight)).write(0, bias)
    return matrix


def dense(weight: torch.Tensor, bias: torch.Tensor | None = None) -> DenseMatrix:
    """The same for the reference ops in float64: the oracle."""
    return DenseMatrix(weight.double(), None if bias is None else bias.double())


def buffer(plan: _cpu.Plan, width: int, dtype: torch.dtype = F32, rows: torch.Tensor | None = None) -> int:
    number = plan.buffer(width, DTYPES[dtype])
    if rows is not None:
        plan.write(number, rows.float().numpy())
    return number


def padded_vector(values: torch.Tensor) -> torch.Tensor:
    whole = torch.zeros(-(-len(values) // PANEL) * PANEL)
    whole[: len(values)] = values
    return whole


def run(plan: _cpu.Plan, tokens: int, picked: Sequence[int] = (), **inputs: torch.Tensor) -> None:
    """Run a plan of ops that look at nothing but `inputs`, of `tokens` tokens of one sequence."""
    zeros = torch.zeros(tokens, dtype=torch.int64)
    plan.run(
        inputs.get("token_ids", zeros).numpy(), inputs.get("positions", zeros).numpy(),
        inputs.get("slots", zeros).numpy(), np.array([0, tokens]), np.array([0, tokens]),
        zeros.numpy(), np.array(picked, np.int64),
    )  # fmt: skip


def run_batch(plan: _cpu.Plan, batch: RaggedBatch) -> None:
    plan.run(
        batch.token_ids.numpy(), batch.positions.numpy(), batch.slots.numpy(), np.array(batch.query_starts),
        np.array(batch.context_starts), batch.context_slots.numpy(), np.empty(0, np.int64),
    )  # fmt: skip


def read(plan: _cpu.Plan, number: int, rows: int) -> torch.Tensor:
    return torch.from_numpy(plan.read(number, rows))


def check_close(found: torch.Tensor, expected: torch.Tensor, allowed: Any) -> None:
    """allowed: how far an entry may be off, a number or one for each."""
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    excess = (found.double() - expected.double()).abs() - torch.as_tensor(allowed, dtype=torch.float64)
    assert excess.numel() == 0 or excess.max() <= 0, f"off by {excess.max():.3g} more than allowed"


def sum_error(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """How far float32 sums of products may be from the exact ones: roundings in a row wander like a random walk."""
    terms = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    return (4 + math.sqrt(weight.shape[1])) * FLOAT32_STEP * terms + 1e-30


def product(
    isa: str, x: torch.Tensor, matrix: PackedMatrix, epilogue: str = "store", *, out: torch.dtype = F32,
    added_to: torch.Tensor | None = None, threads: int = 2, activation: str = "identity",
) -> torch.Tensor:  # fmt: skip
    plan = _cpu.Plan(team(isa, threads), isa)
    source = buffer(plan, matrix.inputs, narrow_of(matrix.dtype), x)
    width = matrix.outputs // (2 if matrix.gated else 1)
    target = buffer(plan, width, out, added_to)
    plan.linear(source, matrix.packed, target, epilogue, False, activation)
    run(plan, len(x))
    return read(plan, target, len(x))


def norm(isa: str, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.dtype = F32) -> torch.Tensor:
    plan = _cpu.Plan(team(isa), isa)
    source, target = buffer(plan, x.shape[1], F32, x), buffer(plan, x.shape[1], out)
    scale = padded_vector(weight)
    plan.norm(source, scale.data_ptr(), eps, target, False)
    run(plan, len(x))
    return read(plan, target, len(x))


def exact_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return reference.linear(x.double(), dense(weight, bias))


def batch_of(sequences: Sequence[tuple[int, Sequence[int]]], positions: Sequence[int] | None = None) -> RaggedBatch:
    """Sequences as (new tokens, slots of the whole context)."""
    lengths = tuple(len(slots) for _, slots in sequences)
    counts = tuple(new for new, _ in sequences)
    tokens = sum(counts)
    return RaggedBatch(
        token_ids=torch.zeros(tokens, dtype=torch.int64),
        positions=torch.zeros(tokens, dtype=torch.int64) if positions is None else torch.tensor(list(positions)),
        slots=torch.tensor([slot for new, slots in sequences for slot in slots[len(slots) - new :]]),
        query_starts=offsets(counts),
        context_lengths=lengths,
        context_slots=torch.tensor([slot for _, slots in sequences for slot in slots]),
        context_starts=offsets(lengths),
    )
