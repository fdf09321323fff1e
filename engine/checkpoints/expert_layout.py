"""Experts in checkpoints: of each layer either one matrix an expert and projection, as models name them, or one tensor
of three dimensions for all experts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from engine.checkpoints.weights import Place, row_ranges

_BLOCK = r"^(?P<layer>.*)\.(?:mlp|block_sparse_moe)\."
_ONE = re.compile(_BLOCK + r"experts\.(?P<expert>\d+)\.(?P<part>\w+)\.weight$")
_ALL = re.compile(_BLOCK + r"experts\.(?P<part>gate_up_proj|gate_proj|up_proj|down_proj)(?:\.weight)?$")
_ROUTER = re.compile(_BLOCK + r"gate\.weight$")
_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


@dataclass(frozen=True, eq=False)
class StackedPlace:
    """The Place of a tensor [E, n, m] whose matrices are made of places [k, m], one below the other.

    parts: of each of the E matrices the same number of places.
    """

    parts: tuple[tuple[Place, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0]
        return (len(self.parts), sum(part.shape[0] for part in first), first[0].shape[1])

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for places in self.parts for part in places)

    @property
    def span(self) -> tuple[int, int]:
        return (0, len(self.parts))

    def write(self, start: int, rows: torch.Tensor) -> None:
        for places, matrix in zip(self.parts[start : start + len(rows)], rows, strict=True):
            done = 0
            for place in places:
                for first, last in row_ranges(place.shape):
                    place.write(first, matrix[done + first : done + last])
                done += place.shape[0]

    def read(self, count: int | None = None) -> torch.Tensor:
        return torch.stack([torch.cat([place.read() for place in places]) for places in self.parts[:count]])


def as_stored(places: Mapping[str, Place], names: Collection[str]) -> Mapping[str, Place]:
    """`places` under the names and in the shapes of a checkpoint that holds tensors of these names.

    Experts that are stored in one tensor get a place of that shape, and a router that is stored under another block's
    name gets that name. The rest is as it was.
    """
    stored = [match for match in map(_ALL.match, names) if match]
    if not stored:
        return places
    routers = {match["layer"]: match[0] for match in map(_ROUTER.match, names) if match}
    experts: dict[tuple[str, str], dict[int, str]] = {}
    moved = dict(places)
    for name in places:
        if one := _ONE.match(name):
            part = _PARTS.get(one["part"], one["part"])
            experts.setdefault((one["layer"], part), {})[int(one["expert"])] = name
        elif (router := _ROUTER.match(name)) and router["layer"] in routers:
            moved[routers[router["layer"]]] = moved.pop(name)
    for match in stored:
        parts = ("gate_proj", "up_proj") if match["part"] == "gate_up_proj" else (match["part"],)
        columns = [experts.get((match["layer"], part), {}) for part in parts]
        if all(columns):
            moved[match[0]] = StackedPlace(
                tuple(tuple(moved.pop(column[expert]) for column in columns) for expert in sorted(columns[0]))
            )
    return moved
