"""An encoder (BERT and its kin): learned positions, attention in both directions, a layer norm behind each block."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.model_config import EncoderConfig, ModelConfig
from engine.checkpoints.task import Task
from engine.checkpoints.weights import Place
from engine.kernels.batch import RaggedBatch
from engine.kernels.kv_cache import KvCache
from engine.kernels.table import Activation, Backend, Ops, Program
from engine.layers.activations import activation_named, activation_names
from engine.layers.encoder_weights import EncoderNames, EncoderWeights, allocate_encoder, encoder_bytes, ignored_names
from engine.layers.heads import head_output
from engine.layers.held import held_config
from engine.parallel.division import Division, divide


@dataclass(frozen=True, eq=False)
class Encoder:
    """An encoder with its head; see `engine.models.model.Model` for what each member means."""

    config: ModelConfig
    task: Task
    dtype: torch.dtype
    weights: EncoderWeights
    traits: EncoderConfig
    activation: Activation
    division: Division
    places: dict[str, Place]
    ignored: tuple[str, ...]
    backend: Backend

    @property
    def reads_whole(self) -> bool:
        return True

    @property
    def held(self) -> ModelConfig:
        return held_config(self.config, self.division)

    @property
    def weight_bytes(self) -> int:
        return encoder_bytes(self.weights)

    def program(self, cache: KvCache) -> Program:
        return self.backend.compile(self._hidden, self._head, cache, self.dtype, self.task.pooling)

    def _hidden(self, ops: Ops, batch: RaggedBatch, cache: KvCache) -> torch.Tensor:
        """One step: whole texts → [T, hidden]."""
        weights, eps = self.weights, self.traits.layer_norm_eps
        step = ops.begin_step(batch, (), self.division.kv.size, (None,), causal=False)
        first = self.traits.first_position
        begin = self.division.vocabulary.start
        x = ops.all_reduce(ops.embedding_sum(batch, weights.tokens, weights.positions, weights.types, first, begin))
        x = ops.layer_norm(x, None, *weights.embedding_norm, eps)
        for layer, keys, values in zip(weights.layers, cache.keys, cache.values, strict=True):
            qkv = ops.linear(x, layer.qkv)
            queries = ops.rotary_store(qkv, None, None, eps, keys, values, None, step)
            attended = ops.attention(queries, keys, values, self.config.head_dim**-0.5, None, step)
            x = ops.layer_norm(ops.all_reduce(ops.linear(attended, layer.output)), x, *layer.attention_norm, eps)
            wide = ops.linear(x, layer.up, self.activation)
            x = ops.layer_norm(ops.all_reduce(ops.linear(wide, layer.down)), x, *layer.mlp_norm, eps)
        return x

    def _head(self, ops: Ops, rows: torch.Tensor) -> torch.Tensor:
        return head_output(ops, rows, self.weights.dense, self.weights.labels)


def build_encoder(
    config: ModelConfig, names: EncoderNames, task: Task, *, dtype: torch.dtype, backend: Backend
) -> Encoder:
    """Allocate an encoder, or a rank's part of it. Raises CheckpointError where the config or the task asks for what it
    has not, and ConfigError where there are more ranks than it can be divided among."""
    activation = activation_named(config.hidden_act)
    if activation is None:
        raise CheckpointError(f"hidden_act is {config.hidden_act!r}; served are {', '.join(activation_names())}")
    if config.encoder is None or task.kind == "generation":
        raise CheckpointError(f"{config.architecture} is an encoder, which cannot generate")
    division = divide(config, backend.group.rank, backend.group.size)
    weights, places = allocate_encoder(config, config.encoder, names, task, division, dtype, backend)
    return Encoder(
        config=config,
        task=task,
        dtype=dtype,
        weights=weights,
        traits=config.encoder,
        activation=activation,
        division=division,
        places=places,
        ignored=ignored_names(names, task),
        backend=backend,
    )
