"""Every family through the whole scheduler against `transformers` in float32: cold, warm, in small chunks, in
batches, and with a pool so small that requests are preempted."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import ISAS, backend
from oracle import check_greedy, reference_logprobs
from simulation import Sent, admit, run_to_end, scheduler_over
from tiny_models import load_oracle, tiny_llama, tiny_mistral, tiny_qwen2, tiny_qwen3

from engine.checkpoints.load_weights import load_weights, open_weights
from engine.checkpoints.read_config import read_model_config
from engine.config import ModelSource
from engine.kernels.kv_cache import allocate_kv_cache
from engine.models.model import Model
from engine.models.registry import build_model
from engine.wire.sampling import LogprobOptions
from scheduler_proc.scheduler import Scheduler

NEW_TOKENS = 48
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

MODELS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "llama": (tiny_llama, {}),
    "llama-llama3-rope": (tiny_llama, {"rope_parameters": LLAMA3}),
    "mistral-window": (tiny_mistral, {"sliding_window": 24}),
    "qwen2-tied": (tiny_qwen2, {}),
    "qwen2-yarn": (tiny_qwen2, {"rope_parameters": YARN}),
    "qwen3": (tiny_qwen3, {}),
    "qwen3-linear-rope": (tiny_qwen3, {"rope_parameters": LINEAR}),
}


BACKENDS = ["reference", *ISAS[:1]]


@pytest.fixture(scope="module", params=[(model, name) for name in BACKENDS for model in MODELS], ids="-".join)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Any]:
    """A tiny checkpoint as read by Tokenmill, and by `transformers`."""
    name, backend_name = request.param
    build, overrides = MODELS[name]
    path = build(tmp_path_factory.mktemp(name) / "model", **overrides)
    source = ModelSource(name=str(path), kind="folder", path=str(path))
    config = read_model_config(source)
    model = build_model(config, dtype=torch.float32, backend=backend(backend_name))
    load_weights(open_weights(source, config), model.places, ignore=model.ignored)
    return model, load_oracle(path)


def serve(model: Model, pool: int, **limits: Any) -> tuple[Scheduler, Sent]:
    cache = allocate_kv_cache(model.config, pool, torch.float32, "cpu")
    return scheduler_over(model.backend, model.program(cache), pool, longest=min(1000, pool - 1), eos_ids=[], **limits)


def prompts(model: Model, count: int) -> list[list[int]]:
    """Random prompts of 1 to 90 ids, half of them behind a shared prefix."""
    source = random.Random(0)
    top = model.config.vocab_size
    shared = [source.randrange(top) for _ in range(40)]
    made = []
    for number in range(count):
        own = [source.randrange(top) for _ in range(source.randrange(1, 50))]
        made.append(shared[: source.randrange(41)] + own if number % 2 else own)
    return made


def check(oracle: Any, sent: Sent, asked: list[list[int]], first_key: int = 0) -> None:
    for number, prompt in enumerate(asked):
        key = first_key + number
        logprobs = [entry.logprob for entry in sent.logprobs[key]]
        assert len(sent.tokens[key]) == len(logprobs) == NEW_TOKENS
        check_greedy(oracle, prompt, sent.tokens[key], logprobs)


@pytest.mark.parametrize(
    ("pool", "limits"),
    [
        (20_000, {"prefill_budget": 512, "max_running": 1}),
        (20_000, {"prefill_budget": 512, "max_running": 7}),
        (20_000, {"prefill_budget": 512, "max_running": 32}),
        (20_000, {"prefill_budget": 32, "max_running": 7}),
        (400, {"prefill_budget": 64, "max_running": 32}),
        (20_000, {"prefill_budget": 512, "max_running": 7, "reuse": False}),
    ],
    ids=["alone", "batch-7", "batch-32", "chunks-of-32", "preempted", "no-cache"],
)
def test_greedy_parity_cold_and_warm(loaded: tuple[Model, Any], pool: int, limits: dict[str, Any]) -> None:
    model, oracle = loaded
    scheduler, sent = serve(model, pool, **limits)
    asked = prompts(model, 8 if limits["max_running"] < 32 else 32)
    for first_key in (0, 1000):  # cold, then warm
        for number, prompt in enumerate(asked):
            scheduler.handle(admit(first_key + number, prompt, new=NEW_TOKENS, logprobs=LogprobOptions()))
        run_to_end(scheduler)
        check(oracle, sent, asked, first_key)
    if pool == 400:
        assert scheduler.planner.preemptions > 0
    elif limits.get("reuse", True):
        assert all(sent.opened[1000 + n].cached_tokens == len(p) - 1 for n, p in enumerate(asked))


def test_prompt_logprobs_with_chunks_and_cache_hits(loaded: tuple[Model, Any]) -> None:
    model, oracle = loaded
    scheduler, sent = serve(model, 5_000, prefill_budget=16, max_running=8)
    prompt = prompts(model, 2)[1] * 2
    starts = [0, 7, len(prompt) - 1, 0, 20]
    for key, start in enumerate(starts):
        wanted = LogprobOptions(start=start, top=2, ids=[5, 3])
        scheduler.handle(admit(key, prompt, new=2, logprobs=wanted))
        run_to_end(scheduler)
    expected = reference_logprobs(oracle, prompt)
    for key, start in enumerate(starts):
        found = sent.opened[key].input_logprobs
        assert found is not None and found.top is not None and found.ids is not None
        assert [token for _, token in found.tokens] == prompt[start:]
        for offset in range(1, len(prompt) - start):
            row = expected[start + offset - 1]
            assert found.tokens[offset][0] == pytest.approx(float(row[prompt[start + offset]]), abs=1e-3)
            assert [p for p, _ in found.top[offset] or []] == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)
            assert [p for p, _ in found.ids[offset] or []] == pytest.approx([float(row[5]), float(row[3])], abs=1e-3)
