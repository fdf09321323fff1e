"""The weights of an encoder: which tensors there are, how they are fused, and where each checkpoint tensor goes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch

from engine.checkpoints.model_config import EncoderConfig, ModelConfig
from engine.checkpoints.task import Task
from engine.checkpoints.weights import Place
from engine.kernels.table import Backend, Matrix
from engine.layers.heads import DenseLayer, allocate_dense
from engine.layers.weights import Allocator
from engine.parallel.division import Division, whole
from engine.parallel.places import NotHere


@dataclass(frozen=True)
class EncoderNames:
    """What a family calls its tensors: the base model's prefix, and the two layers of a classifier's head."""

    base: str
    head_dense: str
    head_output: str


class NormWeights(NamedTuple):
    """Both [hidden]."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True, eq=False)
class EncoderLayer:
    """qkv: query, key and value projections, one below the other; up, down: the MLP's. The norms follow each half."""

    qkv: Matrix
    output: Matrix
    attention_norm: NormWeights
    up: Matrix
    down: Matrix
    mlp_norm: NormWeights


@dataclass(frozen=True, eq=False)
class EncoderWeights:
    """tokens, positions, types: tables [rows, hidden], the last two on rank 0 alone.

    dense: layers of the head. labels: [labels, hidden], behind them; None of a model that embeds.
    """

    tokens: Matrix
    positions: Matrix | None
    types: Matrix | None
    embedding_norm: NormWeights
    layers: tuple[EncoderLayer, ...]
    dense: tuple[DenseLayer, ...]
    labels: Matrix | None


def allocate_encoder(
    config: ModelConfig,
    traits: EncoderConfig,
    names: EncoderNames,
    task: Task,
    division: Division,
    dtype: torch.dtype,
    backend: Backend,
) -> tuple[EncoderWeights, dict[str, Place]]:
    """Unfilled weights of a rank's part of an encoder for a task, and name → place for each tensor of a Hugging Face
    checkpoint. Rank 0 has the tables of positions and types; the head is whole on each."""
    allocator = Allocator(backend, dtype)
    hidden, prefix = config.hidden_size, f"{names.base}.embeddings"

    def small_table(name: str, rows: int) -> Matrix | None:
        full_name = f"{prefix}.{name}_embeddings.weight"
        if division.leads:
            return allocator.table(full_name, whole(rows), hidden)
        allocator.places[full_name] = NotHere((rows, hidden))
        return None

    dense, labels = allocate_dense(allocator.linear, task), None
    if task.kind == "classifier":
        dense = (DenseLayer(allocator.linear({names.head_dense: whole(hidden)}, hidden, bias=True), "tanh"),)
        labels = allocator.linear({names.head_output: whole(task.width)}, hidden, bias=True)
    weights = EncoderWeights(
        tokens=allocator.table(f"{prefix}.word_embeddings.weight", division.vocabulary, hidden),
        positions=small_table("position", traits.positions),
        types=small_table("token_type", traits.type_vocab_size) if traits.type_vocab_size else None,
        embedding_norm=_norm(allocator, f"{prefix}.LayerNorm", hidden),
        layers=tuple(
            _layer(allocator, config, division, f"{names.base}.encoder.layer.{number}")
            for number in range(config.num_layers)
        ),
        dense=dense,
        labels=labels,
    )
    return weights, allocator.places


def _layer(allocator: Allocator, config: ModelConfig, division: Division, prefix: str) -> EncoderLayer:
    hidden, leads = config.hidden_size, division.leads
    queries, kv = division.queries.times(config.head_dim), division.kv.times(config.head_dim)
    qkv = {f"{prefix}.attention.self.{name}": rows for name, rows in (("query", queries), ("key", kv), ("value", kv))}
    return EncoderLayer(
        qkv=allocator.linear(qkv, hidden, bias=True),
        output=allocator.summed(f"{prefix}.attention.output.dense", hidden, queries, bias=True, leads=leads),
        attention_norm=_norm(allocator, f"{prefix}.attention.output.LayerNorm", hidden),
        up=allocator.linear({f"{prefix}.intermediate.dense": division.mlp}, hidden, bias=True),
        down=allocator.summed(f"{prefix}.output.dense", hidden, division.mlp, bias=True, leads=leads),
        mlp_norm=_norm(allocator, f"{prefix}.output.LayerNorm", hidden),
    )


def _norm(allocator: Allocator, name: str, size: int) -> NormWeights:
    return NormWeights(allocator.vector(f"{name}.weight", size), allocator.vector(f"{name}.bias", size))


def encoder_bytes(weights: EncoderWeights) -> int:
    """Memory that the weights take, as they are laid out."""
    matrices = [weights.tokens, *(layer.matrix for layer in weights.dense)]
    vectors = [*weights.embedding_norm]
    matrices += [matrix for matrix in (weights.positions, weights.types, weights.labels) if matrix is not None]
    for layer in weights.layers:
        matrices += [layer.qkv, layer.output, layer.up, layer.down]
        vectors += [*layer.attention_norm, *layer.mlp_norm]
    return sum(matrix.nbytes for matrix in matrices) + sum(vector.nbytes for vector in vectors)


def ignored_names(names: EncoderNames, task: Task) -> tuple[str, ...]:
    """Patterns of names that checkpoints hold and this model has no use for: buffers, and heads of other tasks."""
    base = re.escape(names.base)
    patterns = (r"\.embeddings\.(position_ids|token_type_ids)$", r"^(cls|lm_head)\.")
    if task.kind == "classifier" and names.head_dense.startswith(f"{names.base}.pooler."):
        return patterns
    return (*patterns, rf"^{base}\.pooler\.")
