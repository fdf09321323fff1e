"""A pre-norm decoder (RMS norm, rotary attention, gated MLP), the shape that most families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec
import torch

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.model_config import ModelConfig
from engine.checkpoints.task import Task
from engine.checkpoints.weights import Place
from engine.kernels.batch import RaggedBatch
from engine.kernels.kv_cache import KvCache
from engine.kernels.table import Activation, Backend, MoeWeights, Ops, Program, RotaryFrequencies
from engine.kernels.vocabulary import JoinsHeads, VocabularyGather
from engine.layers.activations import activation_named
from engine.layers.heads import head_output
from engine.layers.held import held_config
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
from engine.parallel.division import Division, divide


@dataclass(frozen=True, eq=False)
class Decoder:
    """A decoder with its head; see `engine.models.model.Model` for what each member means.

    rotaries: of layers without a window, and of those with one where it is another.
    """

    config: ModelConfig
    task: Task
    traits: DecoderTraits
    dtype: torch.dtype
    weights: DecoderWeights
    rotaries: tuple[RotaryFrequencies, ...]
    division: Division
    places: dict[str, Place]
    ignored: tuple[str, ...]
    backend: Backend

    @property
    def reads_whole(self) -> bool:
        return not self._causal or self.task.pooling != "row"

    @property
    def held(self) -> ModelConfig:
        return held_config(self.config, self.division)

    @property
    def weight_bytes(self) -> int:
        return weight_bytes(self.weights)

    def program(self, cache: KvCache) -> Program:
        divided, part = self.division.ranks > 1 and self.task.kind == "generation", self.division.vocabulary
        head: Callable[[Ops, torch.Tensor], Any] = self._head
        if divided and isinstance(self.backend, JoinsHeads):
            divided, head = False, self.backend.joined_head(head, part)
        program = self.backend.compile(self._hidden, head, cache, self.dtype, self.task.pooling)
        return VocabularyGather(program, self.backend, part) if divided else program

    @property
    def _causal(self) -> bool:
        return self.config.causal or self.task.kind == "generation"

    def _hidden(self, ops: Ops, batch: RaggedBatch, cache: KvCache) -> torch.Tensor:
        """One step: the new tokens → [T, hidden] after the final norm."""
        weights, eps = self.weights, self.config.rms_norm_eps
        windows = tuple(dict.fromkeys(self.traits.windows))
        step = ops.begin_step(batch, self.rotaries, self.division.kv.size, windows, causal=self._causal)
        first = self.division.vocabulary.start
        x = ops.all_reduce(ops.embedding(batch.token_ids, weights.embedding, self._embedding_scale, first))
        residual: torch.Tensor | None = None
        scale = self.config.attention_scale or self.config.head_dim**-0.5
        for layer, window, keys, values in zip(
            weights.layers, self.traits.windows, cache.keys, cache.values, strict=True
        ):
            x, residual = ops.rms_norm(x, residual, layer.attention_norm, eps)
            rotary = 0 if window is None else len(self.rotaries) - 1
            x = attention_block(ops, layer.attention, x, keys, values, window, eps, step, scale=scale, rotary=rotary)
            if layer.attention_post_norm is not None:
                x = ops.rms_norm(x, None, layer.attention_post_norm, eps)[0]
            x, residual = ops.rms_norm(x, residual, layer.mlp_norm, eps)
            if isinstance(layer.mlp, MoeWeights):
                x = ops.all_reduce(ops.moe(x, layer.mlp))
            else:
                x = gated_mlp(ops, layer.mlp, x, self.traits.activation)
            if layer.mlp_post_norm is not None:
                x = ops.rms_norm(x, None, layer.mlp_post_norm, eps)[0]
        return ops.rms_norm(x, residual, weights.final_norm, eps)[0]

    @cached_property
    def _embedding_scale(self) -> float:
        """transformers rounds it to the dtype of the weights."""
        if not self.traits.scaled_embedding:
            return 1.0
        return float(torch.tensor(self.config.hidden_size**0.5).to(self.dtype))

    def _head(self, ops: Ops, hidden_rows: torch.Tensor) -> torch.Tensor:
        return head_output(ops, hidden_rows, self.weights.dense, self.weights.head)


def attention_block(
    ops: Ops,
    weights: AttentionWeights,
    x: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    window: int | None,
    eps: float,
    step: Any,
    *,
    scale: float,
    rotary: int,
) -> torch.Tensor:
    """Attention with its projections: x [T, hidden] → [T, hidden]; keys, values: one layer's pool, written at first."""
    qkv = ops.linear(x, weights.qkv)
    queries = ops.rotary_store(qkv, weights.q_norm, weights.k_norm, eps, keys, values, rotary, step)
    attended = ops.attention(queries, keys, values, scale, window, step)
    return ops.all_reduce(ops.linear(attended, weights.output))


def gated_mlp(ops: Ops, weights: MlpWeights, x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """down(activation(gate(x)) * up(x)): x [T, hidden] → [T, hidden]."""
    return ops.all_reduce(ops.linear(ops.gated_linear(x, weights.gate_up, activation), weights.down))


def build_decoder(
    config: ModelConfig, traits: DecoderTraits, task: Task, *, dtype: torch.dtype, backend: Backend
) -> Decoder:
    """Allocate a decoder, or a rank's part of it. Raises CheckpointError where the config asks for what a decoder of
    this shape has not, and ConfigError where there are more ranks than it can be divided among."""
    _check(config, traits, task)
    division = divide(config, backend.group.rank, backend.group.size)
    weights, places = allocate_decoder(config, traits, task, division, dtype, backend)
    return Decoder(
        config=config,
        task=task,
        traits=traits,
        dtype=dtype,
        weights=weights,
        rotaries=_rotaries(config),
        division=division,
        places=places,
        ignored=ignored_names(config, task),
        backend=backend,
    )


def _rotaries(config: ModelConfig) -> tuple[RotaryFrequencies, ...]:
    ropes = (config.rope,) if config.local_rope is None else (config.rope, config.local_rope)
    return tuple(rotary_frequencies(msgspec.structs.replace(config, rope=rope)) for rope in ropes)


def _check(config: ModelConfig, traits: DecoderTraits, task: Task) -> None:
    if activation_named(config.hidden_act) != traits.activation:
        raise CheckpointError(
            f"hidden_act is {config.hidden_act!r}; {config.architecture} is served with {traits.activation!r} only"
        )
    if not config.causal and task.kind != "generation" and any(traits.windows):
        raise CheckpointError(
            "is_causal is false, and there are sliding windows; they are served in one direction only"
        )
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
