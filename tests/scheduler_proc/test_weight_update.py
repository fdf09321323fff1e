"""Weight updates in one process: nobody sees two versions, what does not fit touches nothing, what fails is undone."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import ISAS
from safetensors.torch import save_file
from simulation import admit
from tiny_models import tiny_llama, upside_down
from transformers import LlamaConfig
from updates import Served, digest, served

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.locate import locate
from engine.checkpoints.plain_file import PlainFile
from engine.wire.sampling import LogprobOptions
from engine.wire.to_scheduler import FlushCache
from engine.wire.weights import (
    ContinueGeneration,
    Paused,
    PauseGeneration,
    ReadWeights,
    SetWeightVersion,
    WeightRows,
)
from scheduler_proc.generation import NOT_FLUSHED, UPDATED
from scheduler_proc.weights import WeightsLostError

BACKENDS = [("reference", "float32"), (ISAS[0], "bfloat16")] if ISAS else [("reference", "float32")]
NEW_TOKENS = 12
ROLLED_BACK = "\nRolling back to original weights."


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("old") / "model")


@pytest.fixture(scope="module")
def new(old: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return upside_down(old, tmp_path_factory.mktemp("new") / "model")


def prompts(count: int) -> list[list[int]]:
    """Behind one shared prefix, so that the tree of the old weights is a temptation to the new."""
    source = random.Random(1)
    shared = [source.randrange(3, 400) for _ in range(30)]
    return [shared + [source.randrange(3, 400) for _ in range(source.randrange(1, 20))] for _ in range(count)]


def ask(one: Served, asked: list[list[int]], first_key: int = 0) -> None:
    for number, prompt in enumerate(asked):
        options = LogprobOptions(start=0, top=2)
        one.scheduler.handle(admit(first_key + number, prompt, new=NEW_TOKENS, logprobs=options))


def answers(one: Served, keys: range) -> list[Any]:
    """Tokens and all logprobs of requests, to the bit."""
    return [(one.sent.tokens[key], one.sent.logprobs[key], one.sent.opened[key].input_logprobs) for key in keys]


def check_alike(backend: str, found: list[Any], expected: list[Any]) -> None:
    """To the bit; the reference, whose sums depend on a request's company, up to rounding."""
    if backend != "reference":
        assert found == expected
        return
    assert [tokens for tokens, *_ in found] == [tokens for tokens, *_ in expected]
    for (_, mine, prompt), (_, theirs, other) in zip(found, expected, strict=True):
        assert [row.logprob for row in mine] == pytest.approx([row.logprob for row in theirs], abs=1e-3)
        for (value, _), (wanted, _) in zip(prompt.tokens[1:], other.tokens[1:], strict=True):
            assert value == pytest.approx(wanted, abs=1e-3)


def fresh(path: Path, backend: tuple[str, str], asked: list[list[int]]) -> list[Any]:
    one = served(path, *backend[:1], dtype=backend[1])
    ask(one, asked)
    one.pump()
    return answers(one, range(len(asked)))


@pytest.mark.parametrize("backend", BACKENDS, ids="-".join)
@pytest.mark.parametrize("preempting", [False, True])
def test_each_request_is_computed_by_one_version(
    backend: tuple[str, str], preempting: bool, old: Path, new: Path
) -> None:
    one = served(old, backend[0], 1000, backend[1])
    asked = prompts(6)
    ask(one, asked)
    one.pump(turns=9)
    assert one.scheduler.planner.running and len(one.scheduler.requests) == 6
    one.update(new, weight_version="second")
    updates = one.scheduler.updates
    assert updates is not None
    one.scheduler.turn()
    updates.wait(5)
    one.scheduler.turn()
    assert updates.phase == "draining"
    begun = [key for key, request in one.scheduler.requests.items() if request.begun]
    if preempting:  # they come back before anybody else, and before the update
        for request in list(one.scheduler.planner.running):
            one.scheduler.planner.preempt(request)
    ask(one, asked, 100)
    one.pump()
    assert (one.answer().success, one.answer().message) == (True, f"{UPDATED} Weight version updated to second.")
    assert (one.answer().model_path, one.answer().weight_version) == (str(new), "second")
    by_version = {"default": fresh(old, backend, asked), "second": fresh(new, backend, asked)}
    for key in [*range(6), *range(100, 106)]:
        (version,) = one.sent.versions[key]
        assert version == ("default" if key in begun else "second")
        check_alike(backend[0], answers(one, range(key, key + 1)), by_version[version][key % 100 :][:1])
    assert by_version["default"] != by_version["second"]
    assert 0 < len(begun) < 6 and (one.scheduler.planner.preemptions > 0) == preempting
    assert digest(one.model) == digest(served(new, backend[0], dtype=backend[1]).model)

    # Back to the first: what was cached meanwhile is gone, and the version stays where it is.
    one.update(old)
    one.pump()
    assert (one.answer().message, one.answer().weight_version) == (UPDATED, "second")
    assert one.scheduler.planner.memory.tree.token_count == 0
    ask(one, asked, 200)
    one.pump()
    check_alike(backend[0], answers(one, range(200, 206)), by_version["default"])


def test_updates_wait_for_one_another_and_the_cache_may_be_kept(old: Path, new: Path) -> None:
    one = served(old)
    ask(one, prompts(1))
    one.pump()
    cached = one.scheduler.planner.memory.tree.token_count
    one.update(new, key=1, flush_cache=False)
    one.update(old / "nothing", key=2)
    one.update(old, key=3, weight_version="v3", flush_cache=False)
    one.pump()
    told = [(message.key, message.success) for message in one.sent.others]
    assert told == [(1, True), (2, False), (3, True)]
    assert one.scheduler.planner.memory.tree.token_count == cached > 0
    one.scheduler.handle(SetWeightVersion(4, "v4"))
    assert (one.answer().message, one.scheduler.weight_version) == ("Weight version updated to v4", "v4")
    assert one.answer().model_path is None


@pytest.mark.parametrize("backend", BACKENDS, ids="-".join)
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_copy_that_breaks_off_is_undone(
    backend: tuple[str, str], load_format: str, old: Path, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = served(old, backend[0], dtype=backend[1], load_format=load_format, random_seed=7)
    before = digest(one.model)
    doomed = Path(shutil.copytree(new, tmp_path / "doomed"))
    break_in_copy(one, monkeypatch, lambda: os.truncate(doomed / "model.safetensors", 60_000))
    ask(one, prompts(2))
    one.pump(turns=3)
    one.update(doomed, weight_version="never")
    ask(one, prompts(2), 100)
    one.pump()
    answer = one.answer()
    assert not answer.success and (answer.weight_version, answer.model_path) == ("default", None)
    assert answer.message.startswith("Failed to update weights: ") and answer.message.endswith(ROLLED_BACK)
    assert "it was longer when it was opened" in answer.message
    assert digest(one.model) == before
    check_alike(backend[0], answers(one, range(100, 102)), answers(one, range(2)))
    assert {version for versions in one.sent.versions.values() for version in versions} == {"default"}


def test_a_file_that_is_written_to_while_it_is_copied_is_refused(
    old: Path, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = served(old)
    moving = Path(shutil.copytree(new, tmp_path / "moving"))
    break_in_copy(one, monkeypatch, lambda: os.utime(moving / "model.safetensors", (1, 1)))
    assert "was changed while it was read" in one.refused(moving)


def test_weights_that_cannot_be_restored_end_the_scheduler(
    old: Path, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Path(shutil.copytree(old, tmp_path / "first"))
    one = served(first)

    def spoil() -> None:
        shutil.copy(new / "model.safetensors", first / "model.safetensors")
        raise CheckpointError("the disk is broken")

    break_in_copy(one, monkeypatch, spoil)
    one.update(new)
    with pytest.raises(WeightsLostError, match=r"\(the disk is broken\).* is not what it was when it was loaded"):
        one.pump()


def break_in_copy(one: Served, monkeypatch: pytest.MonkeyPatch, harm: Callable[[], None]) -> None:
    """Do `harm` once some tensors of the new checkpoint are in place."""
    reads = 0
    read = PlainFile.bytes_at

    def counting(self: PlainFile, offset: int, size: int) -> torch.Tensor:
        nonlocal reads
        if one.scheduler.updates is not None and one.scheduler.updates.phase == "copying":
            reads += 1
            if reads == 6:
                harm()
        return read(self, offset, size)

    monkeypatch.setattr(PlainFile, "bytes_at", counting)


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_a_pause_lets_an_update_through(mode: Any, old: Path, new: Path) -> None:
    one = served(old)
    asked = prompts(3)
    ask(one, asked)
    one.pump(turns=8)
    scheduler = one.scheduler
    assert scheduler.planner.running
    scheduler.handle(PauseGeneration(1, mode))
    assert one.sent.others == [Paused(1, True)]
    assert (mode == "in_place") == bool(scheduler.planner.running)
    assert all(one.sent.finishes[key].kind == "abort" for key in range(3)) if mode == "abort" else not one.sent.finishes
    ask(one, asked, 100)
    told = {key: list(tokens) for key, tokens in one.sent.tokens.items()}
    one.update(new, weight_version="second")
    for _ in range(4):
        scheduler.turn()
        assert scheduler.updates is not None
        scheduler.updates.wait(5)
    scheduler.turn()
    flushed = UPDATED if mode != "in_place" else NOT_FLUSHED
    assert one.answer().message == f"{flushed} Weight version updated to second."
    assert one.answer().paused and one.sent.tokens == told
    scheduler.handle(FlushCache(5, 0.0))
    scheduler.turn()
    assert one.sent.others[-1].done == (mode != "in_place")
    scheduler.handle(ContinueGeneration(2))
    assert one.sent.others[-1] == Paused(2, False)
    one.pump()
    if mode != "in_place":  # there the new requests go on from what the old weights have left in the tree
        check_alike("reference", answers(one, range(100, 103)), fresh(new, BACKENDS[0], asked))
    if mode == "retract":  # they go on with the new weights as if these had been given their tokens so far
        again = served(new)
        for key, prompt in enumerate(asked):
            again.scheduler.handle(admit(key, prompt, new=NEW_TOKENS, earlier=told.get(key)))
        again.pump()
        assert again.sent.tokens == {key: one.sent.tokens[key] for key in range(3)}
    assert mode == "abort" or all(len(one.sent.tokens[key]) == NEW_TOKENS for key in range(3))


def test_keep_pause_and_limits_while_paused(old: Path) -> None:
    one = served(old)
    one.update(old, keep_pause=True)
    one.pump()
    scheduler = one.scheduler
    assert one.answer().success and one.answer().paused and scheduler.generation.paused
    ask(one, prompts(2))
    scheduler.requests[0].arrived_at -= 100
    arrived = scheduler.requests[0].arrived_at
    scheduler.turn()
    assert not one.sent.tokens
    scheduler.handle(ContinueGeneration(1))
    scheduler.handle(ContinueGeneration(2))
    assert scheduler.requests[0].arrived_at >= arrived
    one.pump()
    assert len(one.sent.tokens) == 2


def test_tensors_by_name(old: Path) -> None:
    for backend in BACKENDS:
        one = served(old, backend[0], dtype=backend[1])
        weight = one.model.places["model.embed_tokens.weight"].read().float()
        for name, rows in (("model.embed_tokens.weight", 3), ("model.norm.weight", 2), ("nope", 1)):
            one.scheduler.handle(ReadWeights(1, name, rows))
        one.scheduler.turn()
        matrix, vector, missing = one.sent.others
        assert isinstance(matrix, WeightRows) and matrix.values == weight[:3].tolist()
        assert len(vector.values) == 2 and missing.values is None


def test_the_bundled_model_by_its_names_and_from_safetensors(tmp_path: Path) -> None:
    source = locate(None)
    name = ISAS[0] if ISAS else "reference"
    one = served(None, name, dtype="bfloat16", served_model_name="SmolLM2-135M-Instruct")
    last = f".{one.model.config.num_layers - 1}."
    before = digest(one.model, last)
    for path in (source.path, "SmolLM2-135M-Instruct"):
        one.update(path)
        one.pump()
        assert one.answer().success, one.answer().message
        assert digest(one.model, last) == before
    config = one.model.config
    LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, rms_norm_eps=config.rms_norm_eps, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta}, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    save_file({name: place.read() for name, place in one.model.places.items()}, tmp_path / "model.safetensors")
    one.update(tmp_path)
    one.pump()
    assert one.answer().success, one.answer().message
    assert digest(one.model, last) == before


GROWTH = """
import sys
sys.path[:0] = sys.argv[2:]
from updates import served
from pathlib import Path

def peak():
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")).split()[1])

one = served(Path(sys.argv[1]), "BACKEND", dtype="bfloat16")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak()
for _ in range(3):
    one.update(sys.argv[1])
    one.pump()
    assert one.answer().success, one.answer().message
print((peak() - before) / 1000)
"""


def test_an_update_needs_little_memory(tmp_path: Path) -> None:
    """120 MB of weights, of which the largest tensor is a quarter."""
    config = {"vocab_size": 16_000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4}
    LlamaConfig(
        **config, num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    one = served_shapes(tmp_path)
    save_file(
        {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in one.items()}, tmp_path / "model.safetensors"
    )
    tests = Path(__file__).resolve().parents[1]
    script = GROWTH.replace("BACKEND", ISAS[0] if ISAS else "reference")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(tests), str(tests / "scheduler_proc")],
        capture_output=True, text=True, timeout=120, check=True, cwd=tests.parent,
    )  # fmt: skip
    assert float(done.stdout) < 32, f"{done.stdout} MB more at the peak"


def served_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from backends import backend

    from engine.checkpoints.read_config import read_model_config
    from engine.models.registry import build_model

    model = build_model(read_model_config(locate(str(path))), dtype=torch.bfloat16, backend=backend("reference"))
    return {name: place.shape for name, place in model.places.items()}
