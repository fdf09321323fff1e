"""What stands for activations while a plan is recorded: buffers, and what is not recorded yet since where it goes
depends on who takes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.kernels.packed import PackedMatrix
from engine.kernels.table import Activation as Function


@dataclass(frozen=True)
class Activation:
    """A buffer of the plan, of `width` channels."""

    buffer: int
    width: int


@dataclass(frozen=True)
class Stream:
    """The residual stream behind a layer norm: in float32, and as products want it."""

    wide: Activation
    narrow: Activation


@dataclass(frozen=True, eq=False)
class Product:
    """A product that is not recorded yet: where it goes depends on who takes it."""

    source: Activation
    weight: PackedMatrix
    activation: Function


@dataclass(frozen=True)
class Mixture:
    """Buffers of experts' outputs, not added up yet, `width` wide; shared, shared_gate: -1 where there is none."""

    width: int
    outputs: int
    shared: int
    shared_gate: int
    routing: int


@dataclass(frozen=True, eq=False)
class Shared:
    """What is to be added up over all ranks, and is not recorded yet."""

    own: Product | Mixture


@dataclass(frozen=True, eq=False)
class Normed:
    """A norm of float32 rows that is not recorded yet: of which rows depends on who takes it."""

    source: Activation
    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class Picked:
    """The rows that a head gets, not recorded yet: picked or pooled float32 rows, or the norm of picked ones."""

    source: Activation | Normed


@dataclass(frozen=True)
class Rotary:
    """The buffers of a step's cosines and sines, each of `half` channels; none where nothing is rotated."""

    cosines: int | None
    sines: int | None
    half: int


@dataclass(frozen=True)
class Step:
    rotaries: tuple[Rotary, ...]
    causal: bool
