"""Texts that are computed whole, each in one step: what a model that answers with vectors is given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from engine.checkpoints.load_weights import load_weights, open_weights
from engine.checkpoints.read_config import read_model_config
from engine.checkpoints.task import read_task
from engine.config import ModelSource
from engine.kernels.batch import RaggedBatch, offsets
from engine.kernels.kv_cache import step_cache
from engine.kernels.table import Backend, Program
from engine.models.model import Model
from engine.models.registry import build_model

ROOM = 400
"""Tokens that `program` has room for."""


def load(path: Path, on: Backend, dtype: torch.dtype = torch.float32, *, is_embedding: bool = False) -> Model:
    """The checkpoint in the folder `path`, read as a server reads it."""
    source = ModelSource(name="tiny", kind="folder", path=str(path))
    config = read_model_config(source)
    task = read_task(source, config, is_embedding=is_embedding)
    model = build_model(config, task, dtype=dtype, backend=on)
    load_weights(open_weights(source, config, task), model.places, ignore=model.ignored)
    return model


def program(model: Model) -> Program:
    """Its step, over memory that is NaN until it is written."""
    cache = step_cache(model.held, ROOM, model.dtype, "cpu")
    cache.keys[0].fill_(torch.nan)
    cache.values[0].fill_(torch.nan)
    return model.program(cache)


def vectors(
    program: Program, texts: Sequence[torch.Tensor], types: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    """One row for each of `texts` (token ids), which are computed in one step; types: their segments."""
    lengths = tuple(len(text) for text in texts)
    starts = offsets(lengths)
    batch = RaggedBatch(
        token_ids=torch.cat(list(texts)),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        slots=torch.arange(starts[-1]),
        query_starts=starts,
        context_lengths=lengths,
        context_slots=torch.arange(starts[-1]),
        context_starts=starts,
        type_ids=None if types is None else torch.cat(list(types)),
    )
    return program.run(batch, np.array(starts[1:]) - 1).clone()


def random_texts(vocab_size: int, lengths: Sequence[int], seed: int = 1) -> list[torch.Tensor]:
    """Ids from 4 on, which no tiny tokenizer has as padding."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, vocab_size, (length,), generator=generator) for length in lengths]


def check_same(name: str, found: torch.Tensor, alone: torch.Tensor) -> None:
    """Bit for bit on the cpu backend; torch's own products depend on how many rows they have."""
    if name == "reference":
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)
    else:
        assert torch.equal(found, alone), "company changes its bits"
