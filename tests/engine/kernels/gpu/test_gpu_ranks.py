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
from fake_machine import FakeMachine, NotedGroup, watched
from ragged import bits
from thread_group import ThreadGroup, on_each, thread_groups
from tiny_models import tiny_bert, tiny_llama, tiny_qwen2_moe
from transformers import AutoModelForSequenceClassification
from whole_texts import load, program, random_texts, vectors

from engine.kernels.batch import RaggedBatch
from engine.kernels.gpu.backend import GpuBackend, GpuProgram, open_gpu_backend
from engine.kernels.gpu.launch import Call
from engine.kernels.kv_cache import allocate_kv_cache

T = TypeVar("T")

ROOM = 24
MachineOfEachThread = Callable[[], FakeMachine]


@pytest.fixture
def machine_of_each_thread(monkeypatch: pytest.MonkeyPatch) -> MachineOfEachThread:
    """Makes a thread's machine, which its launches go to."""
    machines, run = threading.local(), Call.run

    def launched(call: Call) -> None:
        found: FakeMachine | None = getattr(machines, "own", None)
        if found is None:
            run(call)
        else:
            found.launched(call, run)

    def made() -> FakeMachine:
        machines.own = FakeMachine()
        return machines.own

    monkeypatch.setattr(Call, "run", launched)
    return made


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
    return on_each([open_gpu_backend(device, group) for group in groups], taking_turns)


def steps(prompt: list[int], new: int) -> list[RaggedBatch]:
    """The prompt, then single tokens that the host does not know: 0 for each."""
    given = [(0, prompt), *((len(prompt) + i, [0]) for i in range(new - 1))]
    return [
        RaggedBatch(
            torch.tensor(tokens), torch.arange(start, start + len(tokens)), torch.arange(start, start + len(tokens)),
            (0, len(tokens)), (start + len(tokens),), torch.arange(start + len(tokens)), (0, start + len(tokens)),
        )
        for start, tokens in given
    ]  # fmt: skip


def generated(path: Path, backend: GpuBackend, graphs: bool = False) -> tuple[list[int], torch.Tensor]:
    """The 4 tokens that follow a prompt of 7, each fed on the device, and the logits of the last step."""
    model = load(path, backend)
    program = model.program(allocate_kv_cache(model.held, ROOM, torch.float32, backend.device))
    assert isinstance(program, GpuProgram)
    if graphs:
        with watched(backend.machine):
            assert program.capture(2, 4, ROOM)
    [prompt] = random_texts(model.config.vocab_size, (7,))
    outcomes = []
    for batch in steps(prompt.tolist(), 4):
        sources = np.full(batch.num_tokens, 0 if outcomes else -1)
        outcomes.append(program.queue(batch, np.array([batch.num_tokens - 1]), sources, None, None))
    tokens = [int(outcome().tokens[0]) for outcome in outcomes]
    return tokens, program.logits(np.array([0])).cpu().clone()


@pytest.mark.parametrize("write", [tiny_llama, tiny_qwen2_moe])
def test_tokens(write: Callable[..., Path], device: torch.device, tmp_path: Path) -> None:
    """Every rank has all logits and goes on with the same tokens."""
    path = write(tmp_path / "model", num_hidden_layers=2)
    tokens, logits = generated(path, open_gpu_backend(device))
    (found, whole), (others, same) = on_ranks(2, device, lambda backend: generated(path, backend))
    assert found == others == tokens
    assert bits(whole) == bits(same)
    torch.testing.assert_close(whole, logits, atol=1e-4, rtol=1e-4)


def test_sums_of_ranks_are_captured_with_the_rest(tmp_path: Path, machine_of_each_thread: MachineOfEachThread) -> None:
    path = tiny_llama(tmp_path / "model", num_hidden_layers=2)
    device = torch.device("cpu")
    plain = on_ranks(2, device, lambda backend: generated(path, backend))

    def captured(backend: GpuBackend) -> tuple[list[int], torch.Tensor, int]:
        machine = machine_of_each_thread()
        group = NotedGroup(backend.group, machine)
        made = generated(path, dataclasses.replace(backend, group=group, machine=machine), graphs=True)
        return *made, sum(what == "replay" for what, _ in machine.log)

    for (tokens, logits), (found, same, replays) in zip(plain, on_ranks(2, device, captured), strict=True):
        assert found == tokens and bits(same) == bits(logits)
        assert replays == 3


def test_ranks_keep_the_graphs_that_all_of_them_have(
    tmp_path: Path, machine_of_each_thread: MachineOfEachThread
) -> None:
    path = tiny_llama(tmp_path / "model", num_hidden_layers=1)

    def captured(backend: GpuBackend) -> tuple[int, ...]:
        machine = machine_of_each_thread()
        machine.room = 3 - backend.group.rank
        model = load(path, dataclasses.replace(backend, group=NotedGroup(backend.group, machine), machine=machine))
        program = model.program(allocate_kv_cache(model.held, ROOM, torch.float32, "cpu"))
        assert isinstance(program, GpuProgram)
        with machine.watched():
            return program.capture(4, 4, ROOM)

    assert on_ranks(2, torch.device("cpu"), captured) == [(2, 4), (2, 4)]


def test_vectors(device: torch.device, tmp_path: Path) -> None:
    """Position and type rows are on one rank; the sum has them once."""
    path = tiny_bert(tmp_path / "model", AutoModelForSequenceClassification, num_labels=3, num_hidden_layers=1)

    def made(backend: GpuBackend) -> torch.Tensor:
        model = load(path, backend)
        return vectors(program(model), random_texts(model.config.vocab_size, (5, 1))).cpu()

    found, _ = on_ranks(2, device, made)
    torch.testing.assert_close(found, made(open_gpu_backend(device)), atol=1e-4, rtol=1e-4)
