"""Decodes as graphs, where the model's program can keep steps as such."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from engine.config import ServerConfig
from engine.kernels.queued import CapturingProgram
from engine.kernels.table import Program

logger = logging.getLogger(__name__)

MOST_SEQUENCES = 256
"""Of a step, that graphs are captured for by default: with more of them the GPU has enough to do while it is told."""


@dataclass(frozen=True, slots=True)
class DecodeGraphs:
    """sizes: the numbers of sequences that there are graphs for. gigabytes: of the device's memory, 10^9 bytes."""

    sizes: tuple[int, ...] = ()
    gigabytes: float = 0.0


def capture_decodes(
    program: Program,
    server: ServerConfig,
    running: int,
    longest: int,
    free: Callable[[], int],
    beat: Callable[[], None],
) -> DecodeGraphs:
    """running: most requests in a step. longest: most tokens of one. free: bytes of the device that are free."""
    if server.disable_cuda_graph or not isinstance(program, CapturingProgram):
        return DecodeGraphs()
    most = min(running, server.cuda_graph_max_bs or MOST_SEQUENCES)
    started, before = time.monotonic(), free()
    sizes = program.capture(most, running, longest, beat)
    if not sizes:
        return DecodeGraphs()
    gigabytes = max(0, before - free()) / 1e9
    logger.info(
        "CUDA graphs for decodes of up to %d sequences (%d sizes): %.1f s, %.2f GB",
        sizes[-1], len(sizes), time.monotonic() - started, gigabytes,
    )  # fmt: skip
    return DecodeGraphs(sizes, gigabytes)
