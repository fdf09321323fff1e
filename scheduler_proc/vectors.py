"""Requests that are answered by a vector: the head's row of their prompt, cut and normalised as asked."""

from __future__ import annotations

import numpy as np

from engine.checkpoints.task import Task
from engine.kernels.table import Floats
from engine.wire.to_frontend import Vectors
from scheduler_proc.request import Request


def is_finite(row: Floats) -> bool:
    """Whether a row [W] holds neither NaN nor infinity, which JSON could not say."""
    return bool(np.isfinite(row).all())


def finished(row: Floats, task: Task, dimensions: int | None) -> Floats:
    """A head's row [W] as a client gets it. What is cut is normalised again, whatever the model's habit."""
    if dimensions is not None:
        row = row[:dimensions]
    if not task.normalise and dimensions is None:
        return row
    length = np.sqrt(np.square(row, dtype=np.float64).sum())
    return (row / max(length, 1e-12)).astype(np.float32)


def vectors_message(
    requests: list[Request], rows: list[Floats], hidden: Floats, task: Task, weight_version: str
) -> Vectors:
    """The message of the requests that end with a step. hidden: [R, H], what the head was given."""
    made = []
    for request, row in zip(requests, rows, strict=True):
        options = request.admit.vector
        assert options is not None
        made.append(finished(row, task, options.dimensions))
    return Vectors(
        keys=[request.key for request in requests],
        attempts=[request.admit.attempt for request in requests],
        prompt_tokens=[request.prompt_length for request in requests],
        widths=[len(row) for row in made],
        entries=b"".join(row.astype("<f4").tobytes() for row in made),
        hidden={
            i: hidden[i].astype("<f4").tobytes()
            for i, request in enumerate(requests)
            if request.admit.vector is not None and request.admit.vector.with_hidden
        },
        retracted={request.key: request.retractions for request in requests if request.retractions},
        weight_version=weight_version,
    )
