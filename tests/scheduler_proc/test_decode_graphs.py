"""Which decodes are captured, and what is told about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from simulation import HashModel

from engine.config import ServerConfig
from scheduler_proc.decode_graphs import DecodeGraphs, capture_decodes


@dataclass
class Capturing:
    """A program that has graphs for the sizes `found`."""

    found: tuple[int, ...] = (1, 2, 4)
    asked: list[tuple[int, int, int]] = field(default_factory=list)
    run: Any = None
    logits: Any = None
    pooled: Any = None
    routing: Any = None
    set_profiling: Any = None
    take_profile: Any = None

    def capture(
        self, most: int, running: int, longest: int, beat: Callable[[], None] = lambda: None
    ) -> tuple[int, ...]:
        self.asked.append((most, running, longest))
        beat()
        return self.found


def captured(program: Any, running: int = 48, **flags: Any) -> DecodeGraphs:
    free = iter((9_000_000_000, 7_500_000_000))
    server = ServerConfig(model_path="model", **flags)
    return capture_decodes(program, server, running, 500, lambda: next(free), lambda: None)


@pytest.mark.parametrize(
    ("running", "flags", "most"),
    [(48, {}, 48), (1000, {}, 256), (1000, {"cuda_graph_max_bs": 300}, 300), (48, {"cuda_graph_max_bs": 8}, 8)],
)
def test_as_many_sequences_as_run_within_the_flag(running: int, flags: dict[str, int], most: int) -> None:
    program = Capturing()
    assert captured(program, running, **flags) == DecodeGraphs((1, 2, 4), 1.5)
    assert program.asked == [(most, running, 500)]


def test_none_where_none_are_wanted_or_none_can_be() -> None:
    program = Capturing()
    assert captured(program, disable_cuda_graph=True) == DecodeGraphs() and not program.asked
    assert captured(HashModel(10)) == DecodeGraphs()
    assert captured(Capturing(found=())) == DecodeGraphs()
