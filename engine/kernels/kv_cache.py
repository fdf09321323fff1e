"""The KV pool's memory: one row of keys and one of values for each layer and slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.checkpoints.model_config import ModelConfig
from engine.kernels.host_memory import host_tensor


@dataclass(frozen=True, eq=False)
class KvCache:
    """keys, values: [layers, kv_heads, slots, head_dim], contiguous; the keys are stored rotated.

    Slots in a row are memory in a row, for each head: long contexts are streamed. The dtype may differ from the
    activations'. Who owns which slot is the scheduler's affair.
    """

    keys: torch.Tensor
    values: torch.Tensor


def allocate_kv_cache(config: ModelConfig, slots: int, dtype: torch.dtype, device: torch.device | str) -> KvCache:
    """A pool of `slots` slots, not initialised (so that memory is only touched as it is used)."""
    shape = (config.num_layers, config.num_kv_heads, slots, config.head_dim)
    return KvCache(keys=_allocate(shape, dtype, device), values=_allocate(shape, dtype, device))


def step_cache(config: ModelConfig, tokens: int, dtype: torch.dtype, device: torch.device | str) -> KvCache:
    """Room for the K and V of one step of at most `tokens` tokens, which all layers use in turn: nothing is kept."""
    shape = (1, config.num_kv_heads, tokens, config.head_dim)
    keys, values = (_allocate(shape, dtype, device).expand(config.num_layers, -1, -1, -1) for _ in range(2))
    return KvCache(keys=keys, values=values)


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    if torch.device(device).type == "cpu":
        return host_tensor(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that one token takes in the pool, keys and values of all layers together."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
