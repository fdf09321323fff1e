"""Messages about the weights that serve, and about pausing: from the frontend round the ring to the scheduler, and
its answers."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class UpdateWeights(msgspec.Struct, frozen=True, array_like=True, tag=True, kw_only=True):
    """Replace the weights by those of another checkpoint; answered by `WeightsUpdated`.

    load_format: None for whatever the checkpoint is. weight_version: what to call the new weights; None: as the old.
    flush_cache: empty the radix cache afterwards. keep_pause: compute nothing afterwards until `ContinueGeneration`.
    """

    key: int
    model_path: str
    load_format: str | None = None
    weight_version: str | None = None
    flush_cache: bool = True
    keep_pause: bool = False


class SetWeightVersion(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Call the weights that serve by another version; answered by `WeightsUpdated`."""

    key: int
    weight_version: str


class ReadWeights(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The first `rows` rows of a tensor, by its Hugging Face name; answered by `WeightRows`."""

    key: int
    name: str
    rows: int


class PauseGeneration(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Compute nothing until `ContinueGeneration`; answered by `Paused`.

    What runs is ended ("abort"), sent back to the queue without its slots ("retract"), or stays as it is.
    """

    key: int
    mode: Literal["abort", "retract", "in_place"]


class ContinueGeneration(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Go on after a pause, if there is one; answered by `Paused`."""

    key: int


class WeightsUpdated(msgspec.Struct, frozen=True, array_like=True, tag=True, kw_only=True):
    """Answer to `UpdateWeights` and `SetWeightVersion`, and what is in force from now on.

    model_path: the checkpoint's name where it is a new one. paused: whether generation is.
    """

    key: int
    success: bool
    message: str
    weight_version: str
    model_path: str | None
    paused: bool


class WeightRows(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Answer to `ReadWeights`: a matrix's rows or a vector's entries; None: there is no such tensor."""

    key: int
    values: list[Any] | None


class Paused(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Answer to `PauseGeneration` and `ContinueGeneration`: whether generation is paused now."""

    key: int
    paused: bool


WeightControl = UpdateWeights | SetWeightVersion | ReadWeights | PauseGeneration | ContinueGeneration
WeightAnswer = WeightsUpdated | WeightRows | Paused
