"""What the scheduler may ask of a model, whatever its family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from engine.checkpoints.model_config import ModelConfig
from engine.checkpoints.weights import Place
from engine.kernels.batch import RaggedBatch
from engine.kernels.kv_cache import KvCache


class Model(Protocol):
    """A causal language model whose weights are allocated but not filled: write each tensor into its place first."""

    @property
    def config(self) -> ModelConfig: ...

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

    def hidden(self, batch: RaggedBatch, cache: KvCache) -> torch.Tensor:
        """Run one step: writes the new tokens' K and V into `cache`, returns [T, hidden] after the final norm."""
        ...

    def logits(self, hidden_rows: torch.Tensor) -> torch.Tensor:
        """Rows [R, hidden] of what `hidden` returned → float32 [R, vocabulary]."""
        ...
