"""A model divided among ranks against the same model on one: every kind, on every backend; ranks are threads here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backends import ISAS, backend
from thread_group import on_each, thread_groups
from tiny_models import (
    tiny_bert,
    tiny_gemma3,
    tiny_llama,
    tiny_mistral,
    tiny_mixtral,
    tiny_qwen2,
    tiny_qwen2_moe,
    tiny_qwen3,
    tiny_qwen3_moe,
    tiny_roberta,
)
from transformers import AutoModel, AutoModelForSequenceClassification
from whole_texts import load, program, random_texts, vectors

from engine.kernels import _cpu
from engine.kernels.batch import RaggedBatch
from engine.kernels.cpu import open_cpu_backend
from engine.kernels.eager import EagerBackend
from engine.kernels.kv_cache import allocate_kv_cache
from engine.kernels.table import Backend

BACKENDS = ["reference", *ISAS[:1]]
"""The best instruction set is enough: they differ in nothing that ranks touch."""

GENERATORS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "llama, 9 heads in 3 groups": (tiny_llama, {}),
    "llama, tied, biases": (tiny_llama, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral, one group": (tiny_mistral, {}),
    "qwen2": (tiny_qwen2, {}),
    "qwen3": (tiny_qwen3, {}),
    "gemma3": (tiny_gemma3, {}),
    "qwen2 experts": (tiny_qwen2_moe, {}),
    "qwen3 experts": (tiny_qwen3_moe, {}),
    "mixtral": (tiny_mixtral, {}),
}


def ranked(name: str, size: int, folder: Path) -> list[Backend]:
    """The backend of each rank."""
    if name == "reference":
        return [EagerBackend(group=group) for group in thread_groups(size)]
    where = str(folder / "exchange")
    exchanges = [_cpu.SharedExchange(where, rank, size, 1 << 16, 20.0, rank == 0) for rank in range(size)]
    return [open_cpu_backend(name, [], 1, exchange) for exchange in exchanges]


def logits(path: Path, on: Backend, keep: int | None) -> tuple[torch.Tensor, int]:
    """Of two texts at every position, the second in two chunks, on rank 0; and the bytes of weights that a rank has."""
    model = load(path, on)
    run = model.program(allocate_kv_cache(model.held, 64, torch.float32, "cpu"))
    first, second = random_texts(model.config.vocab_size, (9, 14))
    found = []
    for pieces in ([(first, 0, 9, 0), (second, 0, 8, 20)], [(second, 8, 14, 20)]):
        batch = RaggedBatch(
            token_ids=torch.cat([text[start:stop] for text, start, stop, _ in pieces]),
            positions=torch.cat([torch.arange(start, stop) for _, start, stop, _ in pieces]),
            slots=torch.cat([torch.arange(slot + start, slot + stop) for _, start, stop, slot in pieces]),
            query_starts=(0, *np.cumsum([stop - start for _, start, stop, _ in pieces]).tolist()),
            context_lengths=tuple(stop for _, _, stop, _ in pieces),
            context_slots=torch.cat([torch.arange(slot, slot + stop) for _, _, stop, slot in pieces]),
            context_starts=(0, *np.cumsum([stop for _, _, stop, _ in pieces]).tolist()),
        )
        rows = np.arange(batch.num_tokens)
        found.append(run.run(batch, rows, None if keep is None else np.full(len(rows), keep)).clone())
    return torch.cat(found), model.weight_bytes


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", GENERATORS)
def test_logits(case: str, size: int, name: str, tmp_path: Path) -> None:
    write, overrides = GENERATORS[case]
    path = write(tmp_path / "model", **overrides)
    wanted, all_bytes = logits(path, backend(name), None)
    (found, rank_bytes), *others = on_each(ranked(name, size, tmp_path), lambda on: logits(path, on, None))
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    assert all(len(rest) == 0 for rest, _ in others)
    assert max(rank_bytes, *(one for _, one in others)) < all_bytes * (1 / size + 0.35)


@pytest.mark.parametrize("keep", [0, 1, 5, 10_000])
def test_only_what_is_kept_is_gathered(keep: int, tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "model")
    wanted, _ = logits(path, backend("reference"), None)
    found, _ = on_each(ranked("reference", 2, tmp_path), lambda on: logits(path, on, keep))[0]
    most = max(1, min(keep, wanted.shape[1]))
    torch.testing.assert_close(found.topk(most).values, wanted.topk(most).values, atol=2e-5, rtol=1e-4)
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))
    if keep < 10_000:
        assert (found > -torch.inf).sum(-1).max() <= 2 * most


VECTORS: dict[str, Callable[[Path], Path]] = {
    "bert": lambda path: tiny_bert(path, AutoModelForSequenceClassification, num_labels=3),
    "roberta": lambda path: tiny_roberta(path, AutoModelForSequenceClassification, num_labels=1),
    "reward": lambda path: tiny_llama(path, AutoModelForSequenceClassification, num_labels=1, pad_token_id=3),
    "embedding": lambda path: tiny_qwen3(path, AutoModel),
}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", VECTORS)
def test_vectors(case: str, size: int, name: str, tmp_path: Path) -> None:
    path = VECTORS[case](tmp_path / "model")

    def made(on: Backend) -> torch.Tensor:
        model = load(path, on, is_embedding=case == "embedding")
        return vectors(program(model), random_texts(model.config.vocab_size, (5, 1, 17)))

    found: list[torch.Tensor] = on_each(ranked(name, size, tmp_path), made)
    torch.testing.assert_close(found[0], made(backend(name)), atol=2e-5, rtol=1e-4)
