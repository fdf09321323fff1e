"""Promise 2: a request's answer is the same bit for bit, whoever else is served, however its prompt is cut, cold or on
a cache hit, preempted or not, on any number of threads. On each ISA and in each dtype; ISAs among one another are only
close."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from backends import BFLOAT16_ISAS, ISAS, backend
from simulation import Sent, admit, run_to_end, scheduler_over
from tiny_models import tiny_llama, tiny_mistral, tiny_qwen2_moe, tiny_qwen3

from engine.checkpoints.load_weights import load_weights, open_weights
from engine.checkpoints.read_config import read_model_config
from engine.config import ModelSource
from engine.kernels.kv_cache import allocate_kv_cache
from engine.models.model import Model
from engine.models.registry import build_model
from engine.wire.results import InputLogprobs, TokenLogprobs
from engine.wire.sampling import LogprobOptions
from engine.wire.to_scheduler import Admit
from scheduler_proc.scheduler import Scheduler

MODELS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "llama": (tiny_llama, {"head_dim": 64}),
    "llama-narrow": (tiny_llama, {}),
    "qwen3": (tiny_qwen3, {"head_dim": 64}),
    "qwen2-experts": (tiny_qwen2_moe, {"mlp_only_layers": []}),
    "mistral-window": (tiny_mistral, {"head_dim": 64, "sliding_window": 150}),
}
LAYERS = 2
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BEST = [(ISAS[0], F32), (ISAS[0], BF16)]
OTHERS = [
    kind
    for kind in [*[(isa, dtype) for isa in ISAS for dtype in (F32, F16)], *[(isa, BF16) for isa in BFLOAT16_ISAS]]
    if kind not in BEST
]
PROMPT, NEW = 370, 24
"""The context of the request in question passes 384 tokens: three blocks of keys, and then a fourth."""
LONGEST = 1000


@dataclass(frozen=True)
class Setup:
    """A scheduler's limits."""

    pool: int = 12_000
    budget: int = 4096
    reuse: bool = True
    running: int = 32


SETUPS = {
    "whole": Setup(),
    "chunks of 64": Setup(budget=64),
    "chunks of 16": Setup(budget=16),
    "preempted": Setup(pool=720, budget=256),
    "no cache": Setup(reuse=False, budget=512),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    @cache
    def folder(name: str) -> Path:
        build, overrides = MODELS[name]
        return build(tmp_path_factory.mktemp(name) / "model", num_hidden_layers=LAYERS, **overrides)

    @cache
    def loaded(name: str, backend_name: str, dtype: torch.dtype, threads: int) -> Model:
        path = str(folder(name))
        source = ModelSource(name=path, kind="folder", path=path)
        config = read_model_config(source)
        made = build_model(config, dtype=dtype, backend=backend(backend_name, threads))
        load_weights(open_weights(source, config), made.places, ignore=made.ignored)
        return made

    return loaded


def ids(seed: int, count: int, top: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(top) for _ in range(count)]


def questions(top: int) -> list[Admit]:
    """The requests in question: greedy with logprobs of the prompt from its middle on, and sampled."""
    prompt = ids(1, PROMPT, top)
    greedy = admit(0, prompt, new=NEW, logprobs=LogprobOptions(start=200, top=3, ids=[5, 3]))
    sampled = admit(
        1, prompt[:300], new=NEW, logprobs=LogprobOptions(top=2), temperature=0.9, top_p=0.95, top_k=50, seed=77,
        presence_penalty=0.5,
    )  # fmt: skip
    return [greedy, sampled]


def company(source: random.Random, top: int, first_key: int, setup: Setup) -> list[Admit]:
    """Up to 15 requests, many of which share some of the questions' prompt. Where the pool is small: 12 that begin
    short and grow long."""
    shared = ids(1, PROMPT, top)
    small = setup is SETUPS["preempted"]
    made = []
    for key in range(first_key, first_key + (12 if small else source.randrange(1, 16))):
        prompt = ids(key, source.randrange(1, 15 if small else 100), top)
        if not small:
            prompt = shared[: source.choice([0, 0, 128, 256, source.randrange(PROMPT)])] + prompt
        new = source.randrange(40, 60) if small else source.randrange(1, 30)
        wanted = source.choice([None, LogprobOptions(top=1)])
        made.append(admit(key, prompt, new=new, temperature=source.choice([0.0, 1.0]), seed=key, logprobs=wanted))
    return made


@dataclass(frozen=True)
class Answer:
    """All that a request was answered, and the same as bytes: floats by their bits."""

    tokens: list[int]
    logprobs: list[TokenLogprobs]
    prompt: InputLogprobs | None

    @property
    def bits(self) -> bytes:
        return msgspec.msgpack.encode([self.tokens, self.logprobs, self.prompt])


def answer(sent: Sent, key: int) -> Answer:
    found = Answer(sent.tokens[key], sent.logprobs[key], sent.opened[key].input_logprobs)
    assert len(found.tokens) == len(found.logprobs) == NEW
    return found


def serve(model: Model, setup: Setup) -> tuple[Scheduler, Sent]:
    kv_cache = allocate_kv_cache(model.config, setup.pool, model.dtype, "cpu")
    return scheduler_over(
        model.backend, model.program(kv_cache), setup.pool, longest=min(LONGEST, setup.pool - 1), eos_ids=[],
        reuse=setup.reuse, prefill_budget=setup.budget, max_running=setup.running,
    )  # fmt: skip


def again(question: Admit, key: int) -> Admit:
    return msgspec.structs.replace(question, key=key)


def alone(model: Model, setup: Setup = SETUPS["whole"]) -> list[Answer]:
    """Each question alone in a fresh scheduler, cold."""
    found = []
    for question in questions(model.config.vocab_size):
        scheduler, sent = serve(model, setup)
        scheduler.handle(question)
        run_to_end(scheduler)
        found.append(answer(sent, question.key))
    return found


def check_same(found: Answer, expected: Answer, where: str) -> None:
    assert found.tokens == expected.tokens, where
    off = [
        abs((a.logprob or 0.0) - (b.logprob or 0.0))
        for a, b in zip(found.logprobs, expected.logprobs, strict=True)
    ]  # fmt: skip
    assert found.bits == expected.bits, f"{where}: output logprobs off by {max(off):.3g}"


def check_in_company(model: Model, setup: Setup, expected: list[Answer], seed: int) -> int:
    """Ask in random company, then again with what is cached by then. Returns how often the questions were preempted."""
    source = random.Random(seed)
    top = model.config.vocab_size
    scheduler, sent = serve(model, setup)
    preempted = 0
    for turn in range(2):
        asked = [again(question, 1000 * turn + n) for n, question in enumerate(questions(top))]
        others = company(source, top, 1000 * turn + 10, setup)
        order = asked + others
        source.shuffle(order)
        if setup is SETUPS["preempted"]:
            order.sort(key=lambda request: request in asked)  # the youngest go first
        requests = []
        for request in order:
            scheduler.handle(request)
            if request in asked:
                requests.append(scheduler.requests[request.key])
            for _ in range(0 if setup is SETUPS["preempted"] else source.choice([0, 0, 0, 1, 5])):
                scheduler.step()
        run_to_end(scheduler)
        preempted += sum(request.retractions for request in requests)
        for n, request in enumerate(asked):
            check_same(answer(sent, request.key), expected[n], f"question {n}, turn {turn}, {setup}, company {seed}")
    return preempted


@pytest.mark.parametrize(("isa", "dtype"), BEST, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_in_twenty_companies(model: Callable[..., Model], name: str, isa: str, dtype: torch.dtype) -> None:
    expected = alone(model(name, isa, dtype, 1))
    preempted = 0
    for seed in range(20):
        setup = list(SETUPS.values())[seed % len(SETUPS)]
        preempted += check_in_company(model(name, isa, dtype, 1 + seed % 3), setup, expected, seed)
    assert preempted > 0


@pytest.mark.parametrize(
    ("isa", "dtype", "name"),
    [(*kind, ["llama", "mistral-window", "qwen3", "qwen2-experts"][number % 4]) for number, kind in enumerate(OTHERS)],
    ids=str,
)
def test_on_every_isa(model: Callable[..., Model], isa: str, dtype: torch.dtype, name: str) -> None:
    expected = alone(model(name, isa, dtype, 2))
    for seed, setup in enumerate(SETUPS.values()):
        check_in_company(model(name, isa, dtype, 2), setup, expected, 100 + seed)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_cuts_of_the_prompt(model: Callable[..., Model], name: str, dtype: torch.dtype) -> None:
    """Alone, on each number of threads, the prompt in chunks of any size."""
    expected = alone(model(name, ISAS[0], dtype, 1))
    for threads in (1, 2, 3):
        for budget in (1, 7, 16, 64, 127, 128, 129, 4096):
            if budget > 1 or threads == 2:
                found = alone(model(name, ISAS[0], dtype, threads), replace(SETUPS["whole"], budget=budget))
                for n in range(2):
                    check_same(found[n], expected[n], f"question {n}, chunks of {budget}, {threads} threads")


@pytest.mark.parametrize("name", MODELS)
def test_isas_are_close(model: Callable[..., Model], name: str) -> None:
    def prompt_logprobs(backend_name: str, dtype: torch.dtype) -> torch.Tensor:
        found = alone(model(name, backend_name, dtype, 2))[0].prompt
        assert found is not None
        return torch.tensor([logprob for logprob, _ in found.tokens[1:]])

    exact = prompt_logprobs("reference", F32)
    for isa in ISAS:
        assert (prompt_logprobs(isa, F32) - exact).abs().max() < 1e-3
        assert (prompt_logprobs(isa, F16) - exact).abs().mean() < 0.01
    for isa in BFLOAT16_ISAS:
        assert (prompt_logprobs(isa, BF16) - exact).abs().mean() < 0.1
