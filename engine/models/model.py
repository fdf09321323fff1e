"""What the scheduler may ask of a model, whatever its family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from engine.checkpoints.model_config import ModelConfig
from engine.checkpoints.task import Task
from engine.checkpoints.weights import Place
from engine.kernels.kv_cache import KvCache
from engine.kernels.table import Backend, Program


class Model(Protocol):
    """A model whose weights are allocated but not filled: write each tensor into its place first."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def held(self) -> ModelConfig:
        """`config` with the heads that this rank computes; a KV pool is allocated for it."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices."""
        ...

    @property
    def backend(self) -> Backend:
        """What computes the model, and samples from its logits."""
        ...

    @property
    def task(self) -> Task: ...

    @property
    def reads_whole(self) -> bool:
        """All tokens of a sequence must be computed in one step, since they see one another or are pooled: nothing of
        it can be cached. `program` then takes a `step_cache`."""
        ...

    @property
    def places(self) -> Mapping[str, Place]:
        """Hugging Face tensor name → where it belongs.

        The places are disjoint and cover every weight: all of them must be filled.
        """
        ...

    @property
    def ignored(self) -> tuple[str, ...]:
        """Regular expressions (`re.search`) of names that a checkpoint may hold and this model has no use for."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Memory that the weights take."""
        ...

    def program(self, cache: KvCache) -> Program:
        """The model's step over a KV pool."""
        ...
