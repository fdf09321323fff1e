"""Models divided among ranks that are threads with a backend each, against the same model on one."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from thread_group import ThreadGroup, on_each, thread_groups
from tiny_models import tiny_bert, tiny_llama, tiny_qwen2_moe
from transformers import AutoModelForSequenceClassification
from whole_texts import load, program, random_texts, vectors

from engine.kernels.batch import RaggedBatch
from engine.kernels.gpu.backend import GpuBackend
from engine.kernels.kv_cache import allocate_kv_cache

T = TypeVar("T")

ROOM = 24


@dataclasses.dataclass(frozen=True)
class OneAtATime(ThreadGroup):
    """Lets another rank compute only while this one waits: Triton's interpreter keeps the place it is at in a global
    variable."""

    turn: threading.Lock

    def _meet(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.turn.release()
        try:
            return super()._meet(x)
        finally:
            self.turn.acquire()


def on_ranks(size: int, device: torch.device, work: Callable[[GpuBackend], T]) -> list[T]:
    turn = threading.Lock()

    def taking_turns(backend: GpuBackend) -> T:
        with turn:
            return work(backend)

    groups = [OneAtATime(group.rank, group.meeting, turn) for group in thread_groups(size)]
    return on_each([GpuBackend(device, group) for group in groups], taking_turns)


def generated(path: Path, backend: GpuBackend, keep: int | None) -> tuple[list[int], torch.Tensor]:
    """A prompt of 7 tokens and the 4 that follow on rank 0 (others are told the same), and the logits of each."""
    model = load(path, backend)
    run = model.program(allocate_kv_cache(model.held, ROOM, torch.float32, backend.device))
    [prompt] = random_texts(model.config.vocab_size, (7,))
    tokens, computed, logits = prompt.tolist(), 0, []
    kept = None if keep is None else np.array([keep])
    while len(tokens) < len(prompt) + 4:
        new, slots = torch.arange(computed, len(tokens)), torch.arange(len(tokens))
        batch = RaggedBatch(
            torch.tensor(tokens[computed:]), new, new, (0, len(new)), (len(tokens),), slots, (0, len(tokens))
        )
        found = run.run(batch, np.array([len(new) - 1]), kept)
        computed = len(tokens)
        best = torch.tensor(backend.best(found)[0]) if backend.group.rank == 0 else torch.zeros(1, dtype=torch.int64)
        tokens.append(int(backend.group.all_reduce(best.to(torch.float32)).item()))
        logits.append(found.cpu().clone())
    return tokens[len(prompt) :], torch.cat(logits)


@pytest.mark.parametrize("keep", [None, 0, 3])
@pytest.mark.parametrize("write", [tiny_llama, tiny_qwen2_moe])
def test_tokens(write: Callable[..., Path], keep: int | None, device: torch.device, tmp_path: Path) -> None:
    path = write(tmp_path / "model", num_hidden_layers=2)
    tokens, logits = generated(path, GpuBackend(device), None)
    (found, most), (others, none) = on_ranks(2, device, lambda backend: generated(path, backend, keep))
    assert found == others == tokens
    assert len(none) == 0
    kept = logits.shape[1] if keep is None else max(1, keep)
    torch.testing.assert_close(most.topk(kept).values, logits.topk(kept).values, atol=1e-4, rtol=1e-4)
    if keep is not None:
        assert (most > -torch.inf).sum(-1).max() <= 2 * kept


def test_vectors(device: torch.device, tmp_path: Path) -> None:
    """Position and type rows are on one rank; the sum has them once."""
    path = tiny_bert(tmp_path / "model", AutoModelForSequenceClassification, num_labels=3, num_hidden_layers=1)

    def made(backend: GpuBackend) -> torch.Tensor:
        model = load(path, backend)
        return vectors(program(model), random_texts(model.config.vocab_size, (5, 1))).cpu()

    found, _ = on_ranks(2, device, made)
    torch.testing.assert_close(found, made(GpuBackend(device)), atol=1e-4, rtol=1e-4)
