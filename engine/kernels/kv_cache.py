"""The KV pool's memory: one row of keys and one of values for each layer and slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.checkpoints.model_config import ModelConfig


@dataclass(frozen=True, eq=False)
class KvCache:
    """keys, values: [layers, slots, kv_heads, head_dim], contiguous; the keys are stored rotated.

    Their dtype may differ from the activations'. Who owns which slot is the scheduler's affair.
    """

    keys: torch.Tensor
    values: torch.Tensor


def allocate_kv_cache(config: ModelConfig, slots: int, dtype: torch.dtype, device: torch.device | str) -> KvCache:
    """A pool of `slots` slots, not initialised (so that memory is only touched as it is used)."""
    shape = (config.num_layers, slots, config.num_kv_heads, config.head_dim)
    return KvCache(
        keys=torch.empty(shape, dtype=dtype, device=device), values=torch.empty(shape, dtype=dtype, device=device)
    )


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that one token takes in the pool, keys and values of all layers together."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
