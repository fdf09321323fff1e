"""Mixtures of experts against the reference, and in other company."""

from __future__ import annotations

import pytest
import torch
from ragged import BF16, F16, F32, bits, check, random

from engine.kernels import reference
from engine.kernels.dense import DenseMatrix
from engine.kernels.gpu.experts import laid_out
from engine.kernels.gpu.ops import GpuOps
from engine.kernels.table import MoeWeights, SharedExpert

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the NaN that tests put in


def matrix(seed: int, outputs: int, inputs: int, dtype: torch.dtype, *, biased: bool = False) -> DenseMatrix:
    weight = random(seed, outputs, inputs, dtype=dtype) * inputs**-0.5
    return DenseMatrix(weight, random(seed + 1, outputs, dtype=dtype) if biased else None)


def mixture(
    dtype: torch.dtype, experts: int, width: int, inner: int, top: int, *, normalise: bool, shared: bool, biased: bool
) -> MoeWeights:
    return MoeWeights(
        router=matrix(3, experts, width, dtype),
        gate_ups=tuple(matrix(10 + 4 * i, 2 * inner, width, dtype, biased=biased) for i in range(experts)),
        downs=tuple(matrix(1000 + 4 * i, width, inner, dtype, biased=biased) for i in range(experts)),
        top_k=top,
        normalise=normalise,
        shared=SharedExpert(matrix(5, 44, width, dtype), matrix(6, width, 22, dtype), matrix(7, 1, width, dtype))
        if shared
        else None,
    )


def moved(weights: MoeWeights, device: torch.device | None) -> MoeWeights:
    """On the device; None: in float64, for the oracle."""

    def one(part: DenseMatrix) -> DenseMatrix:
        sides = [
            None if side is None else side.double() if device is None else side.to(device)
            for side in (part.weight, part.offset)
        ]
        assert sides[0] is not None
        return DenseMatrix(sides[0], sides[1])

    return weights._replace(
        router=one(weights.router),
        gate_ups=tuple(one(part) for part in weights.gate_ups),
        downs=tuple(one(part) for part in weights.downs),
        shared=None if weights.shared is None else SharedExpert(*(one(part) for part in weights.shared)),
    )


@pytest.mark.parametrize(
    ("tokens", "experts", "width", "inner", "top", "normalise", "shared", "biased"),
    [
        (1, 8, 48, 36, 2, False, True, False),
        (40, 8, 40, 34, 3, True, False, False),
        (5, 60, 32, 65, 4, False, False, True),
        (17, 2, 70, 16, 2, True, True, False),
        (3, 1, 16, 16, 1, False, False, False),
    ],
)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_mixtures(
    dtype: torch.dtype, tokens: int, experts: int, width: int, inner: int, top: int, normalise: bool, shared: bool,
    biased: bool, device: torch.device,
) -> None:  # fmt: skip
    weights = mixture(dtype, experts, width, inner, top, normalise=normalise, shared=shared, biased=biased)
    x, ops = random(1, tokens, width, dtype=dtype), GpuOps(device)
    found = ops.moe(x.to(device), moved(weights, device))
    assert found.dtype == dtype
    wide = moved(weights, None)
    ids, shares = reference.route(x, weights)
    assert torch.equal(ops.routed[0].cpu().long(), ids)
    check(found, reference.mixture(x.double(), wide, ids, shares.double()), dtype, 8)


def test_the_lower_expert_wins_among_equals(device: torch.device) -> None:
    """And a token's logits that are all NaN still choose experts that exist."""
    weights = mixture(F32, 8, 16, 16, 3, normalise=True, shared=False, biased=False)
    weights.router.weight[1::2] = weights.router.weight[::2]
    x = random(1, 9, 16)
    x[8] = torch.nan
    ops = GpuOps(device)
    ops.moe(x.to(device), moved(weights, device))
    chosen = ops.routed[0].cpu().long()
    assert torch.equal(chosen[:8], reference.route(x[:8], weights)[0])
    assert sorted(chosen[8].tolist()) == [0, 1, 2]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_token_does_not_know_who_shares_its_experts(dtype: torch.dtype, device: torch.device) -> None:
    weights = moved(mixture(dtype, 6, 48, 40, 2, normalise=True, shared=True, biased=False), device)
    x, ops = random(1, 40, 48, dtype=dtype).to(device), GpuOps(device)
    whole = ops.moe(x, weights)
    for rows in ([0], [39, 3], list(range(10, 31)), list(range(39, -1, -1))):
        assert bits(ops.moe(x[rows], weights)) == bits(whole[rows]), rows


def test_choices_are_laid_out_by_expert(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    for tokens, top, experts, rows in ((1, 1, 4, 16), (9, 2, 3, 4), (40, 3, 8, 16), (5, 2, 64, 16)):
        ids = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top].to(torch.int32)
        owners, table = (part.cpu() for part in laid_out(ids.to(device), experts, rows))
        seen = []
        for owner, block in zip(owners.tolist(), table.tolist(), strict=True):
            choices = [choice for choice in block if choice >= 0]
            assert bool(choices) == (owner < experts)
            assert all(ids.view(-1)[choice] == owner for choice in choices)
            seen += choices
        assert sorted(seen) == list(range(tokens * top))
