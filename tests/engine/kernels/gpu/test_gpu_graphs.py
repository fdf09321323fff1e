"""Decodes as graphs: the bits of steps launched kernel by kernel, and what a GPU is told in which order.

A fake machine captures and replays on the CPU; with `-m gpu` it is a GPU's own graphs.
"""

from __future__ import annotations

import dataclasses
import itertools

import msgspec
import numpy as np
import pytest
import torch
from fake_machine import CaptureError, FakeMachine, watched
from hypothesis import given
from hypothesis import strategies as st
from ragged import bits
from simulation import Sent, admit, run_to_end, scheduler_over
from tiny_models import tiny_gemma3, tiny_llama, tiny_qwen3_moe

from engine.checkpoints.load_weights import load_weights, open_weights
from engine.checkpoints.read_config import read_model_config
from engine.config import ModelSource
from engine.kernels.batch import RaggedBatch, offsets
from engine.kernels.gpu.attention import SPLIT
from engine.kernels.gpu.backend import GpuBackend, GpuProgram, open_gpu_backend
from engine.kernels.gpu.graphs import items_ladder, ladder
from engine.kernels.gpu.launch import Call
from engine.kernels.gpu.ring import DEPTH, Ring
from engine.kernels.kv_cache import KvCache, allocate_kv_cache
from engine.models.registry import build_model
from engine.wire.sampling import LogprobOptions
from engine.wire.to_scheduler import Admit

POOL, NEW, SIZES = 200, 4, (1, 2, 4)
MODELS = {
    "dense": (tiny_llama, {"num_hidden_layers": 2}),
    "experts": (tiny_qwen3_moe, {"num_hidden_layers": 2}),
    "windows": (tiny_gemma3, {"sliding_window": 6}),
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    found, run = FakeMachine(), Call.run
    monkeypatch.setattr(Call, "run", lambda call: found.launched(call, run))
    return found


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    build, changes = MODELS[request.param]
    return str(build(tmp_path_factory.mktemp(request.param) / "model", **changes))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("dense") / "model", num_hidden_layers=1))


def backend_of(device: torch.device, machine: FakeMachine) -> GpuBackend:
    backend = open_gpu_backend(device)
    return dataclasses.replace(backend, machine=machine) if device.type == "cpu" else backend


def program_of(folder: str, backend: GpuBackend, pool: int = POOL, dtype: torch.dtype = torch.float32) -> GpuProgram:
    """Over a pool that has a NaN wherever nothing was written."""
    source = ModelSource(name=folder, kind="folder", path=folder)
    config = read_model_config(source)
    model = build_model(config, dtype=dtype, backend=backend)
    load_weights(open_weights(source, config), model.places, ignore=model.ignored)
    cache = allocate_kv_cache(model.config, pool, dtype, backend.device)
    for side in (cache.keys, cache.values):
        side.fill_(torch.nan)
    program = model.program(cache)
    assert isinstance(program, GpuProgram)
    return program


def capture(program: GpuProgram, most: int = 4, longest: int = POOL) -> list[int]:
    with watched(program.machine):
        return list(program.capture(most, 8, longest))


def questions() -> list[Admit]:
    prompt = list(range(3, 22))
    return [
        admit(0, prompt, new=NEW, logprobs=LogprobOptions(top=2, ids=[7, 1])),
        admit(1, prompt[:9], new=NEW + 3, temperature=0.8, top_p=0.9, top_k=20, seed=5, logprobs=LogprobOptions(top=1)),
        admit(2, prompt[:1], new=2, temperature=1.2, seed=8, min_p=0.01, logprobs=LogprobOptions()),
        admit(3, prompt[4:], new=NEW, temperature=0.9, seed=9),
        admit(4, prompt[2:7], new=NEW, presence_penalty=0.4, logit_bias={"11": 2.5}),
    ]


def served(backend: GpuBackend, program: GpuProgram, overlap: bool) -> Sent:
    scheduler, answers = scheduler_over(
        backend, program, POOL, longest=POOL - 1, eos_ids=[], prefill_budget=40, max_running=8,
        queueing=program if overlap else None,
    )  # fmt: skip
    for request in questions():
        scheduler.handle(request)
    run_to_end(scheduler)
    return answers


def test_answers_are_those_without_graphs(dense: str, device: torch.device, machine: FakeMachine) -> None:
    """Step after step, and with a step of overlap (which the last question, whose logits are changed, ends)."""
    backend = backend_of(device, machine)
    plain = served(backend, program_of(dense, backend), False)
    assert len(plain.tokens[1]) == NEW + 3
    for overlap in (False, True):
        program = program_of(dense, backend)
        assert capture(program) == list(SIZES)
        del machine.log[:]
        found = served(backend, program, overlap)
        assert found.tokens == plain.tokens and found.finishes == plain.finishes
        for key in found.opened:
            assert packed(found, key) == packed(plain, key)
        if device.type == "cpu":
            replayed = {number for what, number in machine.log if what == "replay"}
            assert len(replayed) > 1, "no step was replayed, or all by one graph"


def packed(sent: Sent, key: int) -> bytes:
    """Floats by their bits."""
    return msgspec.msgpack.encode([sent.logprobs.get(key), sent.opened[key].input_logprobs])


def decode(lengths: list[int], seed: int = 0, pool: int = POOL) -> RaggedBatch:
    """One token each for sequences that have so many with it."""
    count, all_slots = len(lengths), torch.randperm(pool, generator=torch.Generator().manual_seed(seed))
    contexts = all_slots[: sum(lengths)].split(lengths)
    return RaggedBatch(
        token_ids=torch.arange(3, 3 + count),
        positions=torch.tensor(lengths) - 1,
        slots=torch.cat([context[-1:] for context in contexts]),
        query_starts=tuple(range(count + 1)),
        context_lengths=tuple(lengths),
        context_slots=torch.cat(contexts),
        context_starts=offsets(tuple(lengths)),
    )


def filled(cache: KvCache, batch: RaggedBatch, seed: int = 5) -> None:
    """Numbers where the batch reads and nothing is written by it."""
    there = batch.context_slots.to(cache.keys.device)
    for side in (cache.keys, cache.values):
        shape = side[:, :, there].shape
        made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(side.device, side.dtype)
        side[:, :, there] = made


def run_both(folder: str, backend: GpuBackend, batch: RaggedBatch, pool: int, longest: int) -> list[list[bytes]]:
    """Logits, what the experts chose, and the pool after a step: without graphs, and with them."""
    results = []
    for graphs in (False, True):
        program = program_of(folder, backend, pool)
        if graphs:
            capture(program, longest=longest)
        filled(program.cache, batch)
        logits = program.run(batch, np.arange(batch.num_tokens))
        assert program.graphs is None or program.graphs.hidden.isfinite().all(), "what fills a step up is computed, too"
        chosen = [ids.tobytes() for ids in program.routing()]
        results.append(
            [bits(logits), bits(program.pooled()), bits(program.cache.keys), bits(program.cache.values), *chosen]
        )
    return results


def test_what_fills_a_step_up_leaves_no_trace(folder: str, device: torch.device, machine: FakeMachine) -> None:
    backend = backend_of(device, machine)
    plain, replayed = run_both(folder, backend, decode([9, 30, 1]), POOL, POOL)
    assert replayed == plain
    assert device.type == "cuda" or machine.log[-1] == ("replay", machine.log[-1][1])


def test_long_contexts_take_a_graph_for_more_splits(dense: str, device: torch.device, machine: FakeMachine) -> None:
    """Five splits, where the smallest graph of the size has four; and then a step with few again."""
    backend, pool = backend_of(device, machine), 3 * SPLIT + 200
    batch = decode([2 * SPLIT + 20, SPLIT + 100], pool=pool)
    plain, replayed = run_both(dense, backend, batch, pool, 4 * SPLIT)
    assert replayed == plain
    if device.type == "cpu":
        taken = [number for what, number in machine.log if what == "replay"]
        assert len(taken) == 1 and [work.grid[0] for work in attends(machine, taken[0])] == [8]


def attends(machine: FakeMachine, number: int) -> list[Call]:
    return [step.op for step in machine.graphs[number].steps if isinstance(step.op, Call) and step.op.name == "attend"]


def test_a_capture_touches_nothing_and_waits_for_nothing(folder: str, machine: FakeMachine) -> None:
    """What comes from the host in it, and what waits, the machine refuses; every size is captured once, the largest
    first, with more splits before fewer."""
    program = program_of(folder, backend_of(torch.device("cpu"), machine))
    capture(program, 8, longest=100)
    assert program.cache.keys.isnan().all() and program.cache.values.isnan().all()
    assert [what for what, _ in machine.log] == ["capture"] * 4
    assert [attends(machine, number)[0].grid[0] for number in range(4)] == [8, 4, 2, 1]
    assert [attends(machine, number)[0].arguments["queries"].shape[0] for number in range(4)] == [8, 4, 2, 1]


def test_a_step_is_a_copy_and_a_replay(dense: str, machine: FakeMachine) -> None:
    """Inputs, the graph, then sampling and its copies; buffers are waited for when they come round again."""
    program = program_of(dense, backend_of(torch.device("cpu"), machine))
    capture(program)
    batch, rows = decode([4, 7]), np.arange(2)
    filled(program.cache, batch)
    del machine.log[:]
    first = program.queue(batch, rows, np.full(2, -1), None, None)
    inputs, results = [name for what, name in machine.log if what == "record"]
    assert [entry for entry in machine.log if entry[0] != "pinned"] == [
        ("wait", inputs), ("record", inputs), ("replay", machine.log[3][1]),
        ("launch", "best_parts"), ("launch", "best_whole"), ("wait", results), ("record", results),
    ]  # fmt: skip
    outcomes = [first, *(program.queue(batch, rows, np.arange(2), None, None) for _ in range(DEPTH - 1))]
    made = [outcome() for outcome in outcomes]
    del machine.log[:]
    program.queue(batch, rows, np.arange(2), None, None)
    assert [entry for entry in machine.log if entry[0] == "wait"] == [("wait", inputs), ("wait", results)]
    assert all(len(outcome.tokens) == 2 for outcome in made)
    with pytest.raises(AssertionError, match="given to another step"):
        first()


def test_tokens_are_fed_on_the_device(dense: str, device: torch.device, machine: FakeMachine) -> None:
    """From a step with a graph and from one without, into another row, beside a token that the host has."""
    backend, rows = backend_of(device, machine), np.arange(2)
    first, second = decode([4, 7]), decode([5, 3], seed=1)
    sources = np.array([1, -1])
    found = []
    for graphs in (False, True):
        program = program_of(dense, backend)
        if graphs:
            capture(program)
        filled(program.cache, first)
        filled(program.cache, second, seed=6)
        before = program.queue(first, rows, np.full(2, -1), None, None)
        after = program.queue(second, rows, sources, None, None)
        sampled = before().tokens
        assert program.hidden is not None
        found.append((sampled.tolist(), after().tokens.tolist(), bits(program.hidden)))
        known = dataclasses.replace(second, token_ids=torch.tensor([int(sampled[1]), int(second.token_ids[1])]))
        told = program.queue(known, rows, np.full(2, -1), None, None)
        assert told().tokens.tolist() == found[-1][1] and bits(program.hidden) == found[-1][2]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("batch", "rows"),
    [
        (decode([3, 3, 3, 3, 3]), np.arange(5)),
        (decode([3, 4]), np.array([1])),
        (decode([3, 4]), np.array([1, 0])),
        (decode([120, 60]), np.arange(2)),
    ],
    ids=["more sequences than captured", "not all rows", "rows in another order", "longer contexts than captured"],
)
def test_other_steps_run_without_graphs(
    batch: RaggedBatch, rows: np.ndarray[tuple[int], np.dtype[np.int64]], dense: str, machine: FakeMachine
) -> None:
    backend = backend_of(torch.device("cpu"), machine)
    found = []
    for graphs in (False, True):
        program = program_of(dense, backend)
        if graphs:
            capture(program, longest=30)
        filled(program.cache, batch)
        found.append(bits(program.run(batch, rows)))
    assert found[0] == found[1] and not any(what == "replay" for what, _ in machine.log)


def test_sizes_that_memory_does_not_suffice_for_are_left_out(
    dense: str, machine: FakeMachine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.room = 2
    program = program_of(dense, backend_of(torch.device("cpu"), machine))
    assert capture(program) == [2, 4]
    assert "a CUDA graph of 1 sequences" in caplog.text
    machine.room = 0
    other = program_of(dense, backend_of(torch.device("cpu"), machine))
    assert capture(other) == [] and other.graphs is None
    batch = decode([3, 4])
    filled(other.cache, batch)
    assert not other.run(batch, np.arange(2)).isnan().any()


def test_a_pool_smaller_than_a_step_may_be(dense: str, machine: FakeMachine) -> None:
    program = program_of(dense, backend_of(torch.device("cpu"), machine), pool=3)
    assert capture(program, 16) == [1, 2, 4, 8, 16]


def test_there_are_no_graphs_on_a_processor(dense: str) -> None:
    assert capture(program_of(dense, open_gpu_backend("cpu"))) == []


@pytest.mark.parametrize("refused", ["waits", "host"])
def test_the_fake_refuses_what_a_gpu_refuses(refused: str, machine: FakeMachine) -> None:
    given_to, table = torch.arange(4.0), np.arange(4.0)

    def work() -> None:
        if refused == "waits":
            float(given_to.sum())
        else:
            given_to.add_(torch.from_numpy(table))

    with machine.watched(), pytest.raises(CaptureError):
        given_to.clone()
        machine.capture(work)


def test_a_ring_grows_and_waits() -> None:
    machine = FakeMachine()
    ring = Ring(machine)
    first = [ring.take(10) for _ in range(DEPTH)]
    assert len({slot.buffer.data_ptr() for slot in first}) == DEPTH
    again = ring.take(300)
    assert again is first[0] and len(again.buffer) == 300 and again.lap == 2
    assert [what for what, _ in machine.log[-2:]] == ["wait", "pinned"]


@given(most=st.integers(1, 2000), size=st.integers(1, 300), splits=st.integers(1, 5000))
def test_ladders(most: int, size: int, splits: int) -> None:
    """Ascending to the most that there can be; no step is more than twice, no list of splits more than four times, what
    it takes."""
    sizes = ladder(most)
    assert sizes[0] == 1 and sizes[-1] == most and all(a < b <= 2 * a for a, b in itertools.pairwise(sizes))
    items = items_ladder(size, size * splits)
    assert items[0] == min(2 * size, size * splits) and items[-1] == size * splits
    assert all(a < b <= 4 * a for a, b in itertools.pairwise(items))
