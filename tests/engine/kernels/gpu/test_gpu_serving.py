"""The scheduler over the GPU's backend: what it does to logits, and how it asks for samples and logprobs, works there
as on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import torch
from simulation import Sent, admit, run_to_end, scheduler_over
from tiny_models import tiny_llama

from engine.checkpoints.load_weights import load_weights, open_weights
from engine.checkpoints.read_config import read_model_config
from engine.config import ModelSource
from engine.kernels.batch import RaggedBatch
from engine.kernels.eager import EagerBackend
from engine.kernels.gpu.backend import GpuBackend, GpuProgram, open_gpu_backend
from engine.kernels.gpu.errors import DeviceLostError
from engine.kernels.kv_cache import allocate_kv_cache
from engine.kernels.queued import QueueingProgram
from engine.kernels.table import Backend
from engine.models.registry import build_model
from engine.wire.sampling import LogprobOptions
from engine.wire.to_scheduler import Admit

POOL, NEW = 200, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("served") / "model", num_hidden_layers=1))


def questions() -> list[Admit]:
    """Greedy, drawn, and with everything that changes logits in place."""
    prompt = list(range(3, 22))
    return [
        admit(0, prompt, new=NEW, logprobs=LogprobOptions(start=4, top=2, ids=[7, 1])),
        admit(1, prompt[:9], new=NEW, temperature=0.8, top_p=0.9, top_k=20, seed=5, logprobs=LogprobOptions(top=1)),
        admit(
            2, prompt[3:], new=NEW, temperature=1.1, seed=6, presence_penalty=0.4, frequency_penalty=0.2,
            repetition_penalty=1.2, logit_bias={"11": 2.5, "40": -3.0}, min_new_tokens=2, stop_token_ids=[12],
        ),
    ]  # fmt: skip


def served(
    folder: str,
    backend: Backend,
    device: torch.device | str,
    sent: list[Admit],
    budget: int = 64,
    *,
    overlap: bool = False,
) -> Sent:
    source = ModelSource(name=folder, kind="folder", path=folder)
    config = read_model_config(source)
    model = build_model(config, dtype=torch.float32, backend=backend)
    load_weights(open_weights(source, config), model.places, ignore=model.ignored)
    cache = allocate_kv_cache(model.config, POOL, torch.float32, device)
    program = model.program(cache)
    if overlap:
        assert isinstance(program, QueueingProgram)
    scheduler, answers = scheduler_over(
        backend, program, POOL, longest=POOL - 1, eos_ids=[], prefill_budget=budget, max_running=8,
        queueing=program if overlap and isinstance(program, QueueingProgram) else None,
    )  # fmt: skip
    for request in sent:
        scheduler.handle(request)
    run_to_end(scheduler)
    return answers


def test_answers_are_those_of_the_reference_and_depend_on_nobody_beside(folder: str, device: torch.device) -> None:
    expected = served(folder, EagerBackend(), "cpu", questions())
    backend = open_gpu_backend(device)
    together = served(folder, backend, device, questions(), budget=7)
    assert together.tokens == expected.tokens
    assert len(together.tokens[0]) == len(together.tokens[1]) == NEW
    for key in (0, 1):
        for found, wanted in zip(together.logprobs[key], expected.logprobs[key], strict=True):
            assert found.logprob == pytest.approx(wanted.logprob, abs=1e-5)
    prompt, wanted_prompt = together.opened[0].input_logprobs, expected.opened[0].input_logprobs
    assert prompt is not None and wanted_prompt is not None and len(prompt.tokens) == 19 - 4
    assert [value for value, _ in prompt.tokens[1:]] == pytest.approx(
        [value for value, _ in wanted_prompt.tokens[1:]], abs=1e-5
    )
    for question in questions():
        alone = served(folder, backend, device, [question])
        assert alone.tokens[question.key] == together.tokens[question.key]
        assert packed(alone, question.key) == packed(together, question.key)


def plain_questions() -> list[Admit]:
    """What steps may overlap for: greedy, drawn with and without cuts, with logprobs of each kind."""
    prompt = list(range(3, 22))
    return [
        admit(0, prompt, new=NEW, logprobs=LogprobOptions(top=2, ids=[7, 1])),
        admit(1, prompt[:9], new=NEW + 2, temperature=0.8, top_p=0.9, top_k=20, seed=5, logprobs=LogprobOptions(top=1)),
        admit(2, prompt[:1], new=1, temperature=1.2, seed=8, min_p=0.01, logprobs=LogprobOptions()),
        admit(3, prompt[4:], new=NEW, temperature=0.9, seed=9),
        admit(4, prompt[5:7], new=0),
    ]


def test_steps_that_overlap_give_the_same_bits(folder: str, device: torch.device) -> None:
    backend = open_gpu_backend(device)
    apart = served(folder, backend, device, plain_questions(), budget=7)
    overlapped = served(folder, backend, device, plain_questions(), budget=7, overlap=True)
    assert overlapped.tokens == apart.tokens and overlapped.finishes == apart.finishes
    assert [len(tokens) for tokens in apart.tokens.values()] == [NEW, NEW + 2, 1, NEW, 0]
    for question in plain_questions():
        assert packed(overlapped, question.key) == packed(apart, question.key)


def packed(sent: Sent, key: int) -> bytes:
    """Floats by their bits."""
    return msgspec.msgpack.encode([sent.logprobs.get(key), sent.opened[key].input_logprobs])


@dataclass
class Failing:
    """Stands for a model's step: fails as torch does where it has more than `room` tokens, or at the step `breaks`."""

    inner: Callable[..., Any]
    room: int = 1000
    breaks: int = 1000
    steps: int = 0

    def __call__(self, ops: Any, batch: RaggedBatch, cache: Any) -> Any:
        self.steps += 1
        if batch.num_tokens > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.steps >= self.breaks:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return self.inner(ops, batch, cache)


def failing(backend: GpuBackend, **failures: int) -> GpuBackend:
    class FailingBackend(GpuBackend):
        def compile(self, step: Any, *others: Any, **options: Any) -> GpuProgram:
            return super().compile(Failing(step, **failures), *others, **options)

    return FailingBackend(backend.device, backend.machine)


def test_a_step_too_large_for_the_gpu_is_cut(folder: str, device: torch.device) -> None:
    backend = open_gpu_backend(device)
    expected = served(folder, backend, device, questions()[:2])
    short = served(folder, failing(backend, room=8), device, questions()[:2])
    assert short.tokens == expected.tokens and not any(end.status for end in short.finishes.values())


def test_a_gpu_that_has_failed_ends_the_process_and_no_request(folder: str, device: torch.device) -> None:
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        served(folder, failing(open_gpu_backend(device), breaks=3), device, questions())
