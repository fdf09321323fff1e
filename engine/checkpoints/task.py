"""What a checkpoint is for: to generate text, to embed it, or to classify it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from engine.checkpoints.architectures import ENCODERS, about
from engine.checkpoints.config_fields import Fields
from engine.checkpoints.errors import CheckpointError, makes_sense
from engine.checkpoints.model_config import ModelConfig
from engine.checkpoints.sentence_transformers import DenseModule, SentenceModules, read_sentence_modules
from engine.config import ModelSource

ScoreActivation = Literal["identity", "sigmoid", "tanh", "relu"]

_SCORE_KEY = "sbert_ce_default_activation_function"
_SCORE_ACTIVATIONS: dict[str, ScoreActivation] = {
    "Identity": "identity",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "ReLU": "relu",
}


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What a model makes of a text.

    pooling: which of a sequence's hidden states the head gets (`engine.kernels.table.Pooling`). dense: linear layers
    that an embedding goes through behind it. normalise: vectors have length 1. width: entries of a vector (labels of a
    classifier); 0 where it generates.
    max_length: most tokens that the checkpoint's sentence-transformers files allow, special ones included.
    cross_encoder: it judges pairs of texts; score_activation: what a pair's score is put through.
    dimensions: lengths that an embedding may be cut to; empty: any; None: it was not trained for that.
    """

    kind: Literal["generation", "embedding", "classifier"] = "generation"
    pooling: Literal["row", "first", "mean", "max"] = "row"
    dense: tuple[DenseModule, ...] = ()
    normalise: bool = False
    width: int = 0
    max_length: int | None = None
    cross_encoder: bool = False
    score_activation: ScoreActivation = "identity"
    dimensions: tuple[int, ...] | None = None


def read_task(source: ModelSource, config: ModelConfig, *, is_embedding: bool) -> Task:
    """What the model at `source` is to be served for; is_embedding: the flag of that name. Raises CheckpointError."""
    with makes_sense(source.path):
        return _task(source, config, is_embedding)


def _task(source: ModelSource, config: ModelConfig, is_embedding: bool) -> Task:
    head = about(config.architecture).head
    if head == "classifier":
        return _classifier(source, config)
    if head == "reward":
        return Task(kind="classifier", width=1)
    if head == "embedding" or is_embedding:
        return _embedding(source, config)
    if head == "masked":
        raise CheckpointError(
            f"{source.path}: {config.architecture} is an encoder, which cannot generate; --is-embedding serves it"
        )
    return Task()


def _embedding(source: ModelSource, config: ModelConfig) -> Task:
    modules = read_sentence_modules(Path(source.path), config.hidden_size) if source.kind == "folder" else None
    if modules is None or modules.pooling is None:
        modules = SentenceModules(
            pooling="first" if _is_encoder(config) else "row",
            dense=() if modules is None else modules.dense,
            normalise=True,
            max_length=None if modules is None else modules.max_length,
        )
    assert modules.pooling is not None
    return Task(
        kind="embedding",
        pooling=modules.pooling,
        dense=modules.dense,
        normalise=modules.normalise,
        width=modules.dense[-1].outputs if modules.dense else config.hidden_size,
        max_length=modules.max_length,
        dimensions=_dimensions(_fields(source, config)),
    )


def _classifier(source: ModelSource, config: ModelConfig) -> Task:
    fields = _fields(source, config)
    labels = fields.raw.get("id2label")
    if labels is not None and (not isinstance(labels, dict) or not labels):
        raise fields.error("id2label", "an object with a name for each label")
    width = len(labels) if labels is not None else fields.positive("num_labels", 2)
    encoder = _is_encoder(config)
    return Task(
        kind="classifier",
        pooling="first" if encoder else "row",
        width=width,
        cross_encoder=encoder and width == 1,
        score_activation=_score_activation(fields) if encoder else "identity",
    )


def _score_activation(fields: Fields) -> ScoreActivation:
    name = fields.text_or_none(_SCORE_KEY)
    if name is None:
        return "identity"
    short = name.rpartition(".")[2]
    if not name.startswith("torch.nn.modules.") or short not in _SCORE_ACTIVATIONS:
        raise fields.error(_SCORE_KEY, f"torch.nn.modules' {', '.join(_SCORE_ACTIVATIONS)}")
    return _SCORE_ACTIVATIONS[short]


def _dimensions(fields: Fields) -> tuple[int, ...] | None:
    """`matryoshka_dimensions`, else any length where `is_matryoshka` is set."""
    given = fields.raw.get("matryoshka_dimensions") or []
    if not isinstance(given, list) or not all(type(size) is int and size > 0 for size in given):
        raise fields.error("matryoshka_dimensions", "a list of integers of at least 1")
    return tuple(given) if given or fields.flag("is_matryoshka", False) else None


def _is_encoder(config: ModelConfig) -> bool:
    return about(config.architecture).family in ENCODERS


def _fields(source: ModelSource, config: ModelConfig) -> Fields:
    where = str(Path(source.path) / "config.json") if source.kind == "folder" else source.path
    return Fields(where, config.architecture, config.raw, {})
