"""Rank 0 and its workers without processes: ranks are threads, their sockets queues."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from backends import ISAS, backend
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import admit, run_to_end, scheduler_over
from thread_group import thread_groups
from tiny_models import tiny_llama, upside_down

from engine.checkpoints.load_weights import load_weights, open_weights
from engine.checkpoints.read_config import read_model_config
from engine.config import ModelFacts, ModelSource, RunConfig, ServerConfig
from engine.kernels.eager import EagerBackend
from engine.kernels.kv_cache import allocate_kv_cache
from engine.kernels.table import Backend, Program
from engine.models.model import Model
from engine.models.registry import build_model
from engine.parallel.group import GroupLostError
from engine.wire.to_frontend import Failed
from engine.wire.to_scheduler import QueryState, RecordExperts
from engine.wire.to_worker import FromWorker, HeldPart, RevertWeights, ToWorker
from engine.wire.weights import UpdateWeights
from scheduler_proc import weights as weights_module
from scheduler_proc.ranked_program import Bounds, RankedProgram
from scheduler_proc.ranks import Ranks, put_together
from scheduler_proc.request import new_request
from scheduler_proc.sampler import sample, wanted_logits
from scheduler_proc.weight_updates import WeightUpdates
from scheduler_proc.weights import Checkpoint, RefusedUpdateError, Weights, file_stamps
from scheduler_proc.worker import Line, Worker

SLOTS, VOCABULARY = 300, 420
END = RevertWeights("the test is over")


@dataclass
class Pipe:
    """A socket pair: what is sent is encoded and decoded as it is on the wire."""

    kind: Any
    messages: queue.SimpleQueue[bytes] = field(default_factory=queue.SimpleQueue)
    next: list[Any] = field(default_factory=list)

    def send(self, message: Any) -> None:
        self.messages.put(msgspec.msgpack.encode(message))

    def wait(self, seconds: float | None) -> bool:
        try:
            self.next.append(msgspec.msgpack.decode(self.messages.get(timeout=seconds), type=self.kind))
        except queue.Empty:
            return False
        return True

    def drain(self) -> list[Any]:
        found, self.next = self.next, []
        return found


@dataclass
class Rank:
    model: Model
    program: Program
    weights: Weights


def load(path: Path, on: Backend) -> Rank:
    source = ModelSource(name=str(path), kind="folder", path=str(path))
    config = read_model_config(source, {})
    model = build_model(config, dtype=torch.float32, backend=on)
    load_weights(open_weights(source, config), model.places, ignore=model.ignored)
    facts = ModelFacts(architectures=[], model_type=None, vocab_size=VOCABULARY, context_length=200, eos_ids=[])
    run = RunConfig(
        server=ServerConfig(load_format="auto"), model=source, tokenizer=None, facts=facts, runtime_dir="",
        launcher_pid=0, launch_command="", started_at=0.0,
    )  # fmt: skip
    program = model.program(allocate_kv_cache(model.held, SLOTS, torch.float32, "cpu"))
    return Rank(model, program, Weights(model, Checkpoint(source, False, file_stamps(source)), run))


@contextmanager
def group(path: Path, size: int) -> Iterator[tuple[RankedProgram, Rank, list[Rank]]]:
    """Rank 0's program and rank, and the others, which obey until the block is left."""
    ranks = [load(path, EagerBackend(group=one)) for one in thread_groups(size)]
    answers, pipes = Pipe(FromWorker), [Pipe(ToWorker) for _ in ranks[1:]]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        worker = Worker(Line(number, size, pipes[number - 1], answers), ranks[number].program, ranks[number].weights)
        try:
            while True:
                for message in worker.line.wait():
                    if message == END:
                        return
                    worker.obey(message)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(1, size)]
    for thread in threads:
        thread.start()
    link = Ranks(list(pipes), answers, path, 20.0)
    ranks[0].weights.ranks = link
    try:
        yield RankedProgram(ranks[0].program, link, Bounds(VOCABULARY, SLOTS, 100, 200)), ranks[0], ranks[1:]
    finally:
        link.tell(END)
        for thread in threads:
            thread.join(30)
    assert not failures


def outputs(program: Program, *, divided: bool) -> dict[int, list[int]]:
    """Of requests of all kinds, served together."""
    scheduler, sent = scheduler_over(backend("reference"), program, SLOTS, longest=199, eos_ids=[0])
    scheduler.steps.runner = replace(scheduler.runner, divided=divided)
    for key, kind in enumerate(KINDS):
        scheduler.handle(admit(key, [5 + key, 6, 7 * key + 1], new=12, seed=key, **kind))
    run_to_end(scheduler)
    return sent.tokens


KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0}, {"temperature": 1.0, "top_k": 4}, {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.0, "frequency_penalty": 1.5}, {"temperature": 2.0, "top_k": 300}, {"temperature": 0.7},
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("ranks") / "model")


@pytest.mark.parametrize("size", [2, 3])
def test_workers_obey(model: Path, size: int) -> None:
    wanted = outputs(load(model, backend("reference")).program, divided=False)
    with group(model, size) as (program, _, _):
        assert outputs(program, divided=True) == wanted


@settings(deadline=None)
@given(
    logits=st.lists(st.integers(-9, 9).map(lambda n: n / 2), min_size=6, max_size=60),
    temperature=st.sampled_from([0.0, 0.4, 1.0, 3.0]),
    top_k=st.sampled_from([-1, 1, 2, 5, 40, 1000]),
    top_p=st.sampled_from([1.0, 0.7]),
    min_p=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**32),
    penalty=st.sampled_from([0.0, 0.5]),
    name=st.sampled_from(["reference", *ISAS[:1]]),
)
def test_the_token_is_found_among_the_logits_that_are_wanted(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int, penalty: float,
    name: str,
) -> None:  # fmt: skip
    """The others may be minus infinity, and more may be there than were asked for."""
    message = admit(
        1, [2, 3], temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, frequency_penalty=penalty
    )  # fmt: skip
    request = new_request(message, 1, 100)
    request.append(logits.index(max(logits)))
    rows = torch.tensor([logits])
    kept = rows.clone()
    (keep,) = wanted_logits([request]).tolist()
    if keep >= 0:
        order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
        kept[0, order[keep + seed % 3 :]] = -torch.inf
    found = [sample(backend(name), one, [request], [], original_logprobs=False) for one in (rows.clone(), kept)]
    assert found[0] == found[1]


def test_what_is_wrong_with_a_step_is_found_before_others_are_told(model: Path) -> None:
    with group(model, 2) as (program, _, _):
        wanted = outputs(program, divided=True)
        scheduler, _ = scheduler_over(backend("reference"), program, SLOTS, longest=199, eos_ids=[0])
        scheduler.handle(admit(1, [5, VOCABULARY, 6]))
        scheduler.handle(admit(2, [5, 7, 6]))
        run_to_end(scheduler)
        assert outputs(program, divided=True) == wanted


@pytest.mark.parametrize("error", [MemoryError("none left"), RuntimeError("something"), GroupLostError("gone")])
def test_a_failure_in_a_step_of_all_is_nobodys_alone(model: Path, error: Exception) -> None:
    with group(model, 2) as (program, _, _):
        good = program.inner

        class Failing:
            def run(self, *_: Any) -> torch.Tensor:
                good.run(*_)
                raise error

        program.inner = Failing()  # type: ignore[assignment]
        scheduler, _ = scheduler_over(backend("reference"), program, SLOTS, longest=199, eos_ids=[0])
        scheduler.handle(admit(1, [5, 6]))
        with pytest.raises(GroupLostError):
            scheduler.step()
        program.inner = good


def test_weights_are_replaced_on_all_ranks_or_on_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tiny_llama(tmp_path / "old")
    new = upside_down(old, tmp_path / "new")
    before, after = (outputs(load(path, backend("reference")).program, divided=False) for path in (old, new))
    assert before != after
    name = "model.layers.0.self_attn.o_proj.weight"
    rows = load(new, backend("reference")).weights.rows(name, 5)
    copy = weights_module.copy_weights
    with group(old, 3) as (program, first, others):
        for broken in (first, *others):
            failing = [broken.model.places]

            def breaks_off(reader: Any, places: Any, *, progress: Any, failing: list[Any] = failing) -> None:
                """At its end, once, on one rank."""
                copy(reader, places, progress=progress)
                if failing and places is failing[0]:
                    failing.clear()
                    raise OSError("the disk is gone")

            monkeypatch.setattr(weights_module, "copy_weights", breaks_off)
            with pytest.raises(RefusedUpdateError, match="the disk is gone"):
                first.weights.replace(first.weights.prepare(str(new), None))
            assert not failing
            assert outputs(program, divided=True) == before
        first.weights.replace(first.weights.prepare(str(new), None))
        assert outputs(program, divided=True) == after
        assert first.weights.rows(name, 5) == rows
        assert first.weights.rows("no such tensor", 5) is None


def test_a_question_to_all_ranks_keeps_nobody_waiting_while_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tiny_llama(tmp_path / "old")
    new = upside_down(old, tmp_path / "new")
    reads, may_go_on = threading.Event(), threading.Event()
    copy = weights_module.copy_weights
    with group(old, 2) as (program, first, (other,)):

        def slow(reader: Any, places: Any, **options: Any) -> None:
            if places is other.model.places:
                reads.set()
                may_go_on.wait(10)
            copy(reader, places, **options)

        monkeypatch.setattr(weights_module, "copy_weights", slow)
        updates = WeightUpdates(first.weights)
        scheduler, sent = scheduler_over(
            backend("reference"), program, SLOTS, longest=199, eos_ids=[], updates=updates
        )  # fmt: skip
        scheduler.ranks = first.weights.ranks
        scheduler.handle(UpdateWeights(key=7, model_path=str(new)))
        while not reads.wait(0.01):
            scheduler.turn()
        for key, action in ((8, "start"), (9, "dump")):
            scheduler.handle(RecordExperts(key, action))  # type: ignore[arg-type]
        scheduler.handle(QueryState(10))
        scheduler.turn()
        assert [message.key for message in sent.others] == [10]
        may_go_on.set()
        while scheduler.generation.updating:
            updates.wait(1.0)
            scheduler.turn()
        assert [message.key for message in sent.others] == [10, 7, 8, 9]
        assert all("is not set" in message.error for message in sent.others[2:])

        def broken(action: str) -> None:
            raise RuntimeError(f"{action} is broken")

        monkeypatch.setattr(Ranks, "record", lambda self, action: broken(action))
        updates.phase = "copying"
        scheduler.handle(RecordExperts(11, "stop"))
        assert not updates.read()
        updates.phase = "waiting"
        assert updates.read() == [Failed(11, "internal error: RuntimeError: stop is broken")]


def test_a_rank_shows_signs_of_life_while_it_copies(tmp_path: Path) -> None:
    """And ends at once where it finds in doing so that the group is lost, with no try to take the old weights back."""
    old = tiny_llama(tmp_path / "old")
    new = upside_down(old, tmp_path / "new")
    rank = load(old, backend("reference"))
    weights, beats = rank.weights, [0]

    def beat() -> None:
        beats[0] += 1
        if beats[0] == 100:
            raise GroupLostError("rank 0 is gone")

    weights.beat = beat
    opened = weights.opened(weights.prepare(str(new), None).checkpoint.source)
    weights.replace(opened)
    assert len(rank.model.places) <= beats[0] < 100
    beats[0] = 98
    with pytest.raises(GroupLostError, match="rank 0 is gone"):
        weights.replace(opened)
    assert beats[0] == 100


def test_parts_are_put_together() -> None:
    whole = torch.arange(24.0).reshape(6, 4)

    def part(rank: int, start: int, rows: torch.Tensor) -> HeldPart:
        return HeldPart(rank, start, list(rows.shape), rows.contiguous().numpy().tobytes())

    overlapping = [part(0, 0, whole[:3]), part(1, 2, whole[2:5]), part(2, 5, whole[5:])]
    assert torch.equal(put_together(overlapping, 6, 4), whole)
    assert torch.equal(put_together([part(0, 0, whole[:3]), part(1, 3, whole[3:3])], 3, 4), whole[:3])
    assert torch.equal(put_together([part(0, 0, whole[:2, :1]), part(1, 0, whole[:2, 1:])], 2, 4), whole[:2])
    vector = [part(0, 0, whole[:, 0]), part(1, 0, whole[:, 0])]
    assert torch.equal(put_together(vector, 6, None), whole[:, 0])
