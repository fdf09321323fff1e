"""A pre-norm decoder (RMS norm, rotary attention, gated MLP), the shape that most families share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.model_config import ModelConfig
from engine.checkpoints.task import Task
from engine.checkpoints.weights import Place
from engine.kernels.batch import RaggedBatch
from engine.kernels.kv_cache import KvCache
from engine.kernels.table import Backend, MoeWeights, Ops, Program, RotaryFrequencies
from engine.layers.rope import rotary_frequencies
from engine.layers.weights import (
    AttentionWeights,
    DecoderTraits,
    DecoderWeights,
    MlpWeights,
    allocate_decoder,
    ignored_names,
    weight_bytes,
)


@dataclass(frozen=True, eq=False)
class Decoder:
    """A decoder with its head; see `engine.models.model.Model` for what each member means."""

    config: ModelConfig
    task: Task
    traits: DecoderTraits
    dtype: torch.dtype
    weights: DecoderWeights
    rotary: RotaryFrequencies
    places: dict[str, Place]
    ignored: tuple[str, ...]
    backend: Backend

    @property
    def reads_whole(self) -> bool:
        return False

    @property
    def weight_bytes(self) -> int:
        return weight_bytes(self.weights)

    def program(self, cache: KvCache) -> Program:
        return self.backend.compile(self._hidden, self._logits, cache, self.dtype)

    def _hidden(self, ops: Ops, batch: RaggedBatch, cache: KvCache) -> torch.Tensor:
        """One step: the new tokens → [T, hidden] after the final norm."""
        weights, eps = self.weights, self.config.rms_norm_eps
        windows = tuple(dict.fromkeys(self.traits.windows))
        step = ops.begin_step(batch, (self.rotary,), self.config.num_kv_heads, windows)
        x = ops.embedding(batch.token_ids, weights.embedding)
        residual: torch.Tensor | None = None
        for layer, window, keys, values in zip(
            weights.layers, self.traits.windows, cache.keys, cache.values, strict=True
        ):
            x, residual = ops.rms_norm(x, residual, layer.attention_norm, eps)
            x = attention_block(ops, layer.attention, x, keys, values, window, eps, step)
            x, residual = ops.rms_norm(x, residual, layer.mlp_norm, eps)
            x = ops.moe(x, layer.mlp) if isinstance(layer.mlp, MoeWeights) else gated_mlp(ops, layer.mlp, x)
        return ops.rms_norm(x, residual, weights.final_norm, eps)[0]

    def _logits(self, ops: Ops, hidden_rows: torch.Tensor) -> torch.Tensor:
        return ops.logits(hidden_rows, self.weights.head)


def attention_block(
    ops: Ops,
    weights: AttentionWeights,
    x: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    window: int | None,
    eps: float,
    step: Any,
) -> torch.Tensor:
    """Attention with its projections: x [T, hidden] → [T, hidden]; keys, values: one layer's pool, written at first."""
    qkv = ops.linear(x, weights.qkv)
    queries = ops.rotary_store(qkv, weights.q_norm, weights.k_norm, eps, keys, values, 0, step)
    head_dim: int = keys.shape[2]
    attended = ops.attention(queries, keys, values, head_dim**-0.5, window, step)
    return ops.linear(attended, weights.output)


def gated_mlp(ops: Ops, weights: MlpWeights, x: torch.Tensor) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)): x [T, hidden] → [T, hidden]."""
    return ops.linear(ops.gated_linear(x, weights.gate_up), weights.down)


def build_decoder(
    config: ModelConfig, traits: DecoderTraits, task: Task, *, dtype: torch.dtype, backend: Backend
) -> Decoder:
    """Allocate a decoder. Raises CheckpointError where the config asks for what a decoder of this shape has not."""
    _check(config, traits)
    weights, places = allocate_decoder(config, traits, dtype, backend)
    return Decoder(
        config=config,
        task=task,
        traits=traits,
        dtype=dtype,
        weights=weights,
        rotary=rotary_frequencies(config),
        places=places,
        ignored=ignored_names(config),
        backend=backend,
    )


def _check(config: ModelConfig, traits: DecoderTraits) -> None:
    if config.hidden_act not in ("silu", "swish"):
        raise CheckpointError(f"hidden_act is {config.hidden_act!r}; {config.architecture} is served with 'silu' only")
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(
            f"num_attention_heads, {config.num_heads}, is not a multiple of num_key_value_heads, {config.num_kv_heads}"
        )
    if len(traits.windows) != config.num_layers:
        raise CheckpointError(f"layer_types has {len(traits.windows)} entries for {config.num_layers} layers")
    for window in traits.windows:
        if window is not None and window < 1:
            raise CheckpointError(f"sliding_window is {window}; it must be at least 1")


def sliding_windows(config: ModelConfig) -> tuple[int | None, ...]:
    """The window of each layer, of a family that follows `layer_is_sliding`."""
    return tuple(config.sliding_window if sliding else None for sliding in config.layer_is_sliding)
