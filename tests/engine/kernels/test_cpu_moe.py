"""Mixtures of experts: the reference against a loop over tokens, every ISA against the reference in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from backends import ISAS
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import (
    BF16,
    BFLOAT16_STEP,
    F32,
    KINDS,
    buffer,
    check_close,
    dense,
    kind_id,
    narrow_of,
    packed,
    random,
    run,
    team,
)
from torch.nn.functional import silu

from engine.kernels import _cpu, reference
from engine.kernels.packed import PackedMatrix
from engine.kernels.record import Activation, Recorder
from engine.kernels.table import MoeWeights, SharedExpert

SEEDS = st.integers(0, 2**32 - 1)
kinds = pytest.mark.parametrize(("isa", "dtype"), KINDS, ids=kind_id)


def weights_of(
    experts: int, hidden: int, width: int, top_k: int, normalise: bool, shared: int, dtype: torch.dtype, seed: int
) -> dict[str, list[torch.Tensor]]:
    """Random weights; shared: the shared expert's width, 0 for none."""
    scale = hidden**-0.5
    return {
        "router": [random(seed, experts, hidden, dtype=dtype)],
        "gate_ups": [random(seed + 10 + n, 2 * width, hidden).mul(scale).to(dtype) for n in range(experts)],
        "downs": [random(seed + 500 + n, hidden, width).mul(width**-0.5).to(dtype) for n in range(experts)],
        "shared": [
            random(seed + 1, 2 * shared, hidden).mul(scale).to(dtype),
            random(seed + 2, hidden, shared).mul(shared**-0.5).to(dtype),
            random(seed + 3, 1, hidden).mul(scale).to(dtype),
        ]
        if shared
        else [],
    }


def exact(parts: dict[str, list[torch.Tensor]], top_k: int, normalise: bool) -> MoeWeights:
    shared = SharedExpert(*map(dense, parts["shared"])) if parts["shared"] else None
    (router,) = map(dense, parts["router"])
    return MoeWeights(
        router, tuple(map(dense, parts["gate_ups"])), tuple(map(dense, parts["downs"])), top_k, normalise, shared
    )


def packed_moe(parts: dict[str, list[torch.Tensor]], top_k: int, normalise: bool) -> MoeWeights:
    shared = None
    if parts["shared"]:
        gate_up, down, gate = parts["shared"]
        shared = SharedExpert(packed(gate_up, gated=True), packed(down), packed(gate))
    gate_ups = tuple(packed(one, gated=True) for one in parts["gate_ups"])
    return MoeWeights(
        packed(parts["router"][0]), gate_ups, tuple(map(packed, parts["downs"])), top_k, normalise, shared
    )


def run_moe(isa: str, x: torch.Tensor, weights: MoeWeights, threads: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """The mixture added to a residual stream of ones, and the experts that were taken."""
    plan = _cpu.Plan(team(isa, threads), isa)
    assert isinstance(weights.router, PackedMatrix)
    recorder = Recorder(plan, weights.router.dtype)
    source = buffer(plan, x.shape[1], narrow_of(weights.router.dtype), x)
    residual = Activation(buffer(plan, x.shape[1], F32, torch.ones_like(x)), x.shape[1])
    recorder.rms_norm(recorder.moe(Activation(source, x.shape[1]), weights), residual, torch.ones(1), 1e-5)
    run(plan, len(x))
    return torch.from_numpy(plan.read(residual.buffer, len(x))), torch.from_numpy(plan.routed(recorder.routings[0]))


def check_moe(
    isa: str, dtype: torch.dtype, tokens: int, experts: int, hidden: int, width: int, top_k: int, normalise: bool,
    shared: int, seed: int,
) -> None:  # fmt: skip
    parts = weights_of(experts, hidden, width, top_k, normalise, shared, dtype, seed)
    x = random(seed + 4, tokens, hidden, dtype=narrow_of(dtype))
    found, taken = run_moe(isa, x, packed_moe(parts, top_k, normalise))
    oracle = exact(parts, top_k, normalise)
    logits = x.double() @ parts["router"][0].double().T
    # Float32 sums may order near-equals otherwise; what was taken must be the best up to that.
    best = logits.sort(dim=-1, descending=True).values[:, :top_k]
    picked = logits.gather(1, taken.long())
    check_close(picked, best, 1e-4 * (1 + best.abs()))
    assert all(len(set(row)) == top_k for row in taken.tolist())
    shares = logits.softmax(dim=-1).gather(1, taken.long())
    if normalise:
        shares = shares / shares.sum(dim=-1, keepdim=True)
    expected = reference.mixture(x.double(), oracle, taken.long(), shares) + 1
    # Between the products, gated values are rounded where weights are bfloat16.
    rounding = 4 * BFLOAT16_STEP if dtype == BF16 else 2e-5
    check_close(found, expected, rounding * (1 + expected.abs().amax()))
    row = seed % tokens
    alone, taken_alone = run_moe(isa, x[row : row + 1], packed_moe(parts, top_k, normalise), threads=1)
    assert torch.equal(alone, found[row : row + 1]) and torch.equal(taken_alone, taken[row : row + 1])


@kinds
@settings(max_examples=8, deadline=None)
@given(
    tokens=st.one_of(st.integers(1, 6), st.integers(7, 150)), experts=st.integers(1, 9), hidden=st.integers(1, 90),
    width=st.integers(1, 70), normalise=st.booleans(), shared=st.sampled_from([0, 0, 33]), seed=SEEDS, data=st.data(),
)  # fmt: skip
def test_mixtures(
    isa: str, dtype: torch.dtype, tokens: int, experts: int, hidden: int, width: int, normalise: bool, shared: int,
    seed: int, data: st.DataObject,
) -> None:  # fmt: skip
    top_k = data.draw(st.integers(1, experts), "top_k")
    check_moe(isa, dtype, tokens, experts, hidden, width, top_k, normalise, shared, seed)


@kinds
@pytest.mark.parametrize(
    "sizes", [(700, 2, 40, 40, 2), (40, 128, 33, 8, 8), (1, 64, 520, 300, 8), (300, 1, 64, 700, 1)], ids=str
)
def test_large_mixtures(isa: str, dtype: torch.dtype, sizes: tuple[int, int, int, int, int]) -> None:
    """Experts with more rows than a tile, more experts than pairs, wide ones."""
    tokens, experts, hidden, width, top_k = sizes
    check_moe(isa, dtype, tokens, experts, hidden, width, top_k, True, 0, seed=tokens)


@pytest.mark.parametrize("isa", ["reference", *ISAS])
def test_the_lower_expert_wins_a_tie(isa: str) -> None:
    """Twelve experts in three groups of equals, and a token that likes none better than another."""
    router = torch.tensor([2.0, 1.0, 3.0] * 4)[:, None].expand(12, 5).contiguous()
    x = torch.cat((torch.ones(1, 5), torch.zeros(1, 5), -torch.ones(40, 5)))
    taken = [[2, 5, 8, 11, 0, 3], [0, 1, 2, 3, 4, 5], *[[1, 4, 7, 10, 0, 3]] * 40]
    parts = weights_of(12, 5, 4, 6, True, 0, F32, 1) | {"router": [router]}
    if isa == "reference":
        found = reference.route(x, exact(parts, 6, True)._replace(router=dense(router)))[0]
    else:
        found = run_moe(isa, x, packed_moe(parts, 6, True))[1]
    assert found.tolist() == taken


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_finite_stays_in_its_row(isa: str) -> None:
    parts = weights_of(8, 20, 12, 3, False, 7, F32, 5)
    x = random(6, 9, 20)
    whole, _ = run_moe(isa, x, packed_moe(parts, 3, False))
    for bad in (math.nan, math.inf):
        x[4, 2] = bad
        found, taken = run_moe(isa, x, packed_moe(parts, 3, False))
        others = [row for row in range(9) if row != 4]
        assert not torch.isfinite(found[4]).any() and torch.equal(found[others], whole[others])
        assert all(len({*row} & {*range(8)}) == 3 for row in taken.tolist())


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 12), experts=st.integers(1, 8), normalise=st.booleans(), seed=SEEDS, data=st.data())
def test_reference_is_the_sum_over_each_tokens_experts(
    tokens: int, experts: int, normalise: bool, seed: int, data: st.DataObject
) -> None:
    top_k, shared = data.draw(st.integers(1, experts), "top_k"), data.draw(st.sampled_from([0, 9]), "shared")
    parts = weights_of(experts, 13, 6, top_k, normalise, shared, F32, seed)
    x = random(seed + 4, tokens, 13).double()

    def mlp(gate_up: torch.Tensor, down: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        gate, up = (gate_up.double() @ row).chunk(2)
        return down.double() @ (silu(gate) * up)

    found = reference.moe(x, exact(parts, top_k, normalise))
    for row, result in zip(x, found, strict=True):
        shares = (parts["router"][0].double() @ row).softmax(0)
        best = sorted(range(experts), key=lambda expert: (-float(shares[expert]), expert))[:top_k]
        whole = sum(shares[expert] for expert in best) if normalise else 1.0
        expected = sum(
            mlp(parts["gate_ups"][expert], parts["downs"][expert], row) * shares[expert] / whole for expert in best
        )
        if shared:
            gate_up, down, gate = parts["shared"]
            expected = expected + torch.sigmoid(gate.double() @ row) * mlp(gate_up, down, row)
        torch.testing.assert_close(result, torch.as_tensor(expected), rtol=1e-9, atol=1e-9)


def test_what_does_not_fit_is_refused() -> None:
    isa = ISAS[0]
    plan = _cpu.Plan(team(isa), isa)
    for top_k in (0, 5):
        with pytest.raises(ValueError, match=f"top_k is {top_k}; it must be from 1 to the number of experts, 4"):
            plan.routing(4, top_k)
    routing = plan.routing(4, 2)
    x, logits, narrow = buffer(plan, 40), buffer(plan, 4), buffer(plan, 3)
    gated, outputs = plan.buffer(16, 0, 2), plan.buffer(40, 0, 2)
    ups = [packed(random(n, 32, 40), gated=True).packed for n in range(4)]
    downs = [packed(random(n, 40, 16)).packed for n in range(4)]
    for refused in (
        lambda: plan.route(narrow, routing, True),
        lambda: plan.experts(x, tuple(ups[:3]), gated, routing),
        lambda: plan.experts(x, (*ups[:3], downs[0]), gated, routing),
        lambda: plan.experts(x, tuple(ups), buffer(plan, 16), routing),
        lambda: plan.experts(x, tuple(downs), outputs, routing),
        lambda: plan.experts(gated, (), outputs, routing),
        lambda: plan.combine(outputs, -1, logits, x, routing),
        lambda: plan.combine(gated, -1, -1, x, routing),
    ):
        with pytest.raises(ValueError, match=r"not|differ|no experts"):
            refused()
    plan.route(logits, routing, True)
    plan.experts(x, tuple(ups), gated, routing)
    plan.experts(gated, tuple(downs), outputs, routing)
    plan.combine(outputs, -1, -1, x, routing)
    plan.write(x, np.ones((3, 40), np.float32))
    run(plan, 3)
    assert plan.routed(routing).shape == (3, 2)
