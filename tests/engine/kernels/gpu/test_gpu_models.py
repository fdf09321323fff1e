"""Whole tiny models through the backend, against the reference backend: every family, cut into steps and mixed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ragged import BF16, F32, bits
from tiny_models import (
    load_oracle,
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
from transformers import AutoModel

from engine.checkpoints.expert_layout import as_stored
from engine.checkpoints.read_config import read_model_config
from engine.checkpoints.task import Task
from engine.config import ModelSource
from engine.kernels.batch import RaggedBatch, offsets
from engine.kernels.eager import EagerBackend
from engine.kernels.gpu.backend import open_gpu_backend
from engine.kernels.kv_cache import allocate_kv_cache
from engine.kernels.table import Backend, Pooling
from engine.models.model import Model
from engine.models.registry import GENERATION, build_model

DECODERS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "llama": (tiny_llama, {}),
    "llama biases, yarn": (
        tiny_llama,
        {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "mistral": (tiny_mistral, {}),
    "qwen2": (tiny_qwen2, {}),
    "qwen3": (tiny_qwen3, {}),
    "gemma3": (tiny_gemma3, {}),
    "qwen2 experts": (tiny_qwen2_moe, {}),
    "qwen3 experts": (tiny_qwen3_moe, {}),
    "mixtral": (tiny_mixtral, {}),
}  # fmt: skip
POOL = 160
LENGTHS = (13, 5)
STEPS = [[(0, 9), (1, 2)], [(0, 1), (1, 2)], [(0, 2), (1, 1)], [(0, 1)]]
"""Of each step, which sequence computes how many tokens: chunks and decodes, alone and together."""


def small(write: Callable[..., Path]) -> dict[str, Any]:
    return {"num_hidden_layers": 2, **({"sliding_window_pattern": 2} if write is tiny_gemma3 else {})}


def model_on(path: Path, oracle: Any, dtype: torch.dtype, backend: Backend, task: Task = GENERATION) -> Model:
    config = read_model_config(ModelSource(name="tiny", kind="folder", path=str(path)))
    model = build_model(config, task, dtype=dtype, backend=backend)
    ignored = re.compile("|".join(model.ignored)) if model.ignored else None
    weights = {name: tensor for name, tensor in oracle.state_dict().items() if not (ignored and ignored.search(name))}
    places = as_stored(model.places, weights)
    for name, place in places.items():
        place.write(0, weights[name if name in weights else name.partition(".")[2]])
    return model


def run_steps(model: Model, dtype: torch.dtype, device: torch.device, steps: list[list[tuple[int, int]]]) -> list[Any]:
    """Logits of both sequences, and what their tokens were routed to in the first mixture of experts."""
    cache = allocate_kv_cache(model.config, POOL, dtype, device)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    program = model.program(cache)
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(model.config.vocab_size, (length,), generator=generator) for length in LENGTHS]
    slots = torch.randperm(POOL, generator=generator)[: sum(LENGTHS)].split(LENGTHS)
    done = [0, 0]
    logits: list[list[torch.Tensor]] = [[], []]
    for step in steps:
        stops = {sequence: done[sequence] + count for sequence, count in step}
        lengths = tuple(stops.values())
        news = [(sequence, slice(done[sequence], stop)) for sequence, stop in stops.items()]
        batch = RaggedBatch(
            token_ids=torch.cat([tokens[sequence][new] for sequence, new in news]),
            positions=torch.cat([torch.arange(new.start, new.stop) for _, new in news]),
            slots=torch.cat([slots[sequence][new] for sequence, new in news]),
            query_starts=offsets(tuple(count for _, count in step)),
            context_lengths=lengths,
            context_slots=torch.cat([slots[sequence][: new.stop] for sequence, new in news]),
            context_starts=offsets(lengths),
        )
        found = program.run(batch, np.arange(batch.num_tokens)).cpu().clone()
        for (sequence, new), start in zip(news, batch.query_starts, strict=False):
            logits[sequence].append(found[start : start + new.stop - new.start])
            done[sequence] = new.stop
    return [torch.cat(some) for some in logits if some]


QUICK = ("llama", "gemma3", "qwen2 experts")
CASES = [
    pytest.param(family, dtype, marks=() if dtype == F32 or family in QUICK else pytest.mark.slow)
    for family in DECODERS
    for dtype in (F32, BF16)
]


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_decoders(family: str, dtype: torch.dtype, device: torch.device, tmp_path: Path) -> None:
    """In float32 the logits of the reference; in bfloat16 no further from these than the reference comes; and the same
    bits for other steps."""
    write, overrides = DECODERS[family]
    path = write(tmp_path / "model", **{**small(write), **overrides})
    oracle = load_oracle(path)
    exact = run_steps(model_on(path, oracle, F32, EagerBackend()), F32, torch.device("cpu"), STEPS)
    ours = model_on(path, oracle, dtype, open_gpu_backend(device))
    found = run_steps(ours, dtype, device, STEPS)
    if dtype == F32:
        for some, wanted in zip(found, exact, strict=True):
            torch.testing.assert_close(some, wanted, atol=1e-4, rtol=1e-4)
    elif ours.config.moe is None:  # a rounding that tips a choice between experts is no loss of precision
        theirs = run_steps(model_on(path, oracle, dtype, EagerBackend()), dtype, torch.device("cpu"), STEPS)
        for some, other, wanted in zip(found, theirs, exact, strict=True):
            assert (some - wanted).square().mean() <= 1.5 * (other - wanted).square().mean()
    alone = run_steps(ours, dtype, device, [[(1, 5)]])
    assert bits(alone[0]) == bits(found[1])


def test_routing_is_that_of_the_reference(device: torch.device, tmp_path: Path) -> None:
    path = tiny_qwen2_moe(tmp_path / "model")
    oracle, routes = load_oracle(path), []
    for backend, where in ((EagerBackend(), torch.device("cpu")), (open_gpu_backend(device), device)):
        model = model_on(path, oracle, F32, backend)
        program = model.program(allocate_kv_cache(model.config, 9, F32, where))
        ids = torch.arange(9)
        program.run(RaggedBatch(ids, ids, ids, (0, 9), (9,), ids, (0, 9)), np.array([8]))
        routes.append(program.routing())
    assert len(routes[0]) == len(routes[1]) == 2
    for found, expected in zip(*routes, strict=True):
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("write", "pooling"), [(tiny_bert, "mean"), (tiny_roberta, "first")])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_encoders(
    write: Callable[..., Path], pooling: Pooling, dtype: torch.dtype, device: torch.device, tmp_path: Path
) -> None:
    path = write(tmp_path / "model", num_hidden_layers=2)
    oracle = load_oracle(path, auto=AutoModel)
    lengths = (1, 7, 30)
    ids = torch.randint(100, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    slots, rows = torch.arange(sum(lengths)), np.array([0, 7, 37])
    found = []
    for backend, where, kind in (
        (EagerBackend(), torch.device("cpu"), F32),
        (open_gpu_backend(device), device, dtype),
    ):
        model = model_on(path, oracle, kind, backend, Task(kind="embedding", pooling=pooling, width=48))
        positions = torch.cat([torch.arange(length) for length in lengths])
        batch = RaggedBatch(ids, positions, slots, offsets(lengths), lengths, slots, offsets(lengths))
        program = model.program(allocate_kv_cache(model.config, len(slots), kind, where))
        found.append(program.run(batch, rows).cpu().clone())
    tolerance = 1e-4 if dtype == F32 else 0.1
    torch.testing.assert_close(found[1], found[0], atol=tolerance, rtol=tolerance)
