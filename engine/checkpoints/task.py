"""What a checkpoint is for: to generate text, to embed it, or to classify it."""

from __future__ import annotations

from typing import Literal

import msgspec

from engine.checkpoints.model_config import ModelConfig
from engine.config import ModelSource


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What a model makes of a text.

    pooling: which of a sequence's hidden states the head gets (`engine.kernels.table.Pooling`). normalise: vectors have
    length 1. width: entries of a vector (labels of a classifier); 0 where it generates.
    max_length: most tokens that the checkpoint's sentence-transformers files allow, special ones included.
    cross_encoder: it judges pairs of texts; score_activation: what a pair's score is put through.
    dimensions: lengths that an embedding may be cut to; empty: any; None: it was not trained for that.
    """

    kind: Literal["generation", "embedding", "classifier"] = "generation"
    pooling: Literal["row", "first", "mean", "max"] = "row"
    normalise: bool = False
    width: int = 0
    max_length: int | None = None
    cross_encoder: bool = False
    score_activation: Literal["identity", "sigmoid", "tanh", "relu"] = "identity"
    dimensions: tuple[int, ...] | None = None


def read_task(source: ModelSource, config: ModelConfig, *, is_embedding: bool) -> Task:
    """What the model at `source` is to be served for; is_embedding: the flag of that name. Raises CheckpointError."""
    return Task()
