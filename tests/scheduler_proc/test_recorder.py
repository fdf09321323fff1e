"""The recorder of experts against hooks on the router of `transformers`, and what start, stop and dump do."""

from __future__ import annotations

import csv
import logging
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from backends import ISAS, backend
from simulation import Sent, admit, run_to_end, scheduler_over, simulated_scheduler
from tiny_models import load_oracle, tiny_qwen2_moe

from engine.checkpoints.load_weights import load_weights, open_weights
from engine.checkpoints.model_config import ModelConfig
from engine.checkpoints.read_config import read_model_config
from engine.config import ModelSource, ServerConfig
from engine.kernels.batch import RaggedBatch
from engine.kernels.kv_cache import allocate_kv_cache
from engine.models.model import Model
from engine.models.registry import build_model
from engine.wire.to_frontend import ExpertsRecorded
from engine.wire.to_scheduler import RecordExperts
from scheduler_proc.record_spool import Spool
from scheduler_proc.recorder import Recorder, recorder_settings
from scheduler_proc.runner import Runner
from scheduler_proc.scheduler import Scheduler

LAYERS = (0, 2)
EXPERTS, TOP_K = 8, 2
Counts = dict[tuple[int, int], int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 0 and 2 have experts, layer 1 has none."""
    return tiny_qwen2_moe(tmp_path_factory.mktemp("experts") / "model")


def config_of(folder: Path) -> ModelConfig:
    return read_model_config(ModelSource(name="tiny", kind="folder", path=str(folder)))


def loaded(folder: Path, backend_name: str) -> Model:
    source, config = ModelSource(name="tiny", kind="folder", path=str(folder)), config_of(folder)
    model = build_model(config, dtype=torch.float32, backend=backend(backend_name))
    load_weights(open_weights(source, config), model.places, ignore=model.ignored)
    return model


def recorder_of(config: ModelConfig, out: Path, mode: str = "stat", passes: int | None = None) -> Recorder:
    settings = recorder_settings(
        ServerConfig(
            expert_distribution_recorder_mode=mode,
            expert_distribution_recorder_buffer_size=passes,
            expert_distribution_recorder_dir=str(out),
        ),
        config,
    )
    assert settings is not None
    return Recorder(settings)


def serve(model: Model, recorder: Recorder, *, budget: int = 16) -> tuple[Scheduler, Sent]:
    cache = allocate_kv_cache(model.config, 400, torch.float32, "cpu")
    scheduler, sent = scheduler_over(
        model.backend, model.program(cache), 400, longest=300, eos_ids=[], prefill_budget=budget
    )
    scheduler.runner = scheduler.steps.runner = Runner(scheduler.runner.program, model.backend, recorder)
    return scheduler, sent


def rows_of(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def counts_of(path: Path) -> Counts:
    found = {(int(row["layer_id"]), int(row["expert_id"])): int(row["count"]) for row in rows_of(path)}
    assert list(found) == [(layer, expert) for layer in LAYERS for expert in range(EXPERTS)]
    return found


def hooked(oracle: Any, sequences: list[list[int]]) -> dict[int, list[list[set[int]]]]:
    """Layer → sequence → token: the experts that `transformers` chooses."""
    found: dict[int, list[list[set[int]]]] = {layer: [] for layer in LAYERS}
    hooks = [
        oracle.model.layers[layer].mlp.gate.register_forward_hook(
            lambda _module, _inputs, output, layer=layer: found[layer].append([set(row) for row in output[2].tolist()])
        )
        for layer in LAYERS
    ]
    with torch.no_grad():
        for tokens in sequences:
            oracle(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    return found


def counted(choices: dict[int, list[list[set[int]]]], skipped: list[int]) -> Counts:
    """Counts of all tokens but the first `skipped` of each sequence."""
    result = {(layer, expert): 0 for layer in LAYERS for expert in range(EXPERTS)}
    for layer, sequences in choices.items():
        for rows, first in zip(sequences, skipped, strict=True):
            result |= {
                (layer, expert): result[layer, expert] + n
                for expert, n in Counter(expert for row in rows[first:] for expert in row).items()
            }
    return result


@pytest.mark.parametrize("mode", ["stat", "per_pass", "per_token"])
@pytest.mark.parametrize("passes", [7, -1])
def test_a_record_outlives_the_process(folder: Path, tmp_path: Path, mode: str, passes: int) -> None:
    """However often it dies, and wherever in a line it was: the dump is that of a process that has not."""
    source = np.random.default_rng(5)

    def steps(recorder: Recorder) -> None:
        for _ in range(int(source.integers(1, 6))):
            tokens = int(source.integers(1, 5))
            batch: Any = SimpleNamespace(token_ids=torch.arange(tokens), positions=torch.arange(tokens) + 3)
            taken = [source.integers(0, EXPERTS, (tokens, TOP_K)).astype(np.int32) for _ in LAYERS]
            for one in (recorder, calm):
                one.step(batch, lambda taken=taken: taken)

    def born(torn: bytes = b"") -> Recorder:
        with (runtime / "experts-1").open("ab") as file:
            file.write(torn)
        recorder = recorder_of(config_of(folder), tmp_path / "out", mode, passes)
        recorder.spool = Spool(runtime, recorder.settings.passes)
        recorder.resume()
        return recorder

    runtime = tmp_path / "runtime"
    runtime.mkdir()
    calm, recorder = recorder_of(config_of(folder), tmp_path / "calm", mode, passes), born()
    assert not recorder.on and not recorder.kept
    recorder.start()
    calm.start()
    for life in range(12):
        steps(recorder)
        recorder = born([b"", b"\x40\0", b"\x40" + bytes(7) + b"half"][life % 3])
        assert recorder.on and recorder.number == calm.number
    recorder.stop()
    recorder = born()
    assert not recorder.on and len(recorder.kept) == len(calm.kept) == (7 if passes == 7 else calm.number)
    assert recorder.dump(0).read_text() == calm.dump(0).read_text()
    assert not born().kept


def test_a_record_that_cannot_be_written_is_kept_in_memory(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = recorder_of(config_of(folder), tmp_path / "out")
    recorder.spool = Spool(tmp_path / "is not there", 5)
    recorder.start()
    batch: Any = SimpleNamespace(token_ids=torch.arange(1), positions=torch.arange(1))
    for _ in range(3):
        recorder.step(batch, lambda: [np.zeros((1, TOP_K), np.int32)] * len(LAYERS))
    assert len(recorder.kept) == 3 and caplog.text.count("kept in memory alone") == 1
    recorder.stop()
    assert counts_of(recorder.dump(0))[0, 0] == 3 * TOP_K


@pytest.mark.parametrize("name", ["reference", ISAS[0]])
def test_counts_are_those_of_hooks_on_the_router(name: str, folder: Path, tmp_path: Path) -> None:
    """Every computed token once, prompts in chunks beside decodes; what the cache has, and what was computed before the
    start or after the stop, does not count."""
    model = loaded(folder, name)
    scheduler, sent = serve(model, recorder_of(model.config, tmp_path))
    recorder = scheduler.runner.recorder
    assert recorder is not None
    source = np.random.default_rng(7)
    prompts = [source.integers(3, 400, size).tolist() for size in (20, 45, 7, 1)]
    prompts.append([*prompts[1][:30], *prompts[2]])
    scheduler.handle(admit(100, prompts[0][:9], new=3))
    run_to_end(scheduler)
    scheduler.handle(RecordExperts(1, "start"))
    cached = []
    for key, prompt in enumerate(prompts):
        scheduler.handle(admit(key, prompt, new=5))
        run_to_end(scheduler) if key in (1, 3) else scheduler.step()
        cached.append(key)
    run_to_end(scheduler)
    scheduler.handle(RecordExperts(2, "stop"))
    scheduler.handle(admit(101, prompts[3], new=4))
    run_to_end(scheduler)
    # The last token that is generated is never computed.
    sequences = [prompt + sent.tokens[key][:-1] for key, prompt in enumerate(prompts)]
    skipped = [sent.opened[key].cached_tokens for key in range(len(prompts))]
    assert sum(skipped) > 0
    expected = counted(hooked(load_oracle(folder), sequences), skipped)
    computed = sum(map(len, sequences)) - sum(skipped)
    found = counts_of(recorder.dump(0))
    assert found == expected
    assert {sum(n for (at, _), n in found.items() if at == layer) for layer in LAYERS} == {computed * TOP_K}
    assert sent.others == [ExpertsRecorded(1), ExpertsRecorded(2)]


def test_each_token_and_each_pass(folder: Path, tmp_path: Path) -> None:
    """The three modes of one run say the same."""
    model = loaded(folder, ISAS[0])
    prompts = [list(range(10, 33)), list(range(50, 60))]
    recorders = [recorder_of(model.config, tmp_path / mode, mode) for mode in ("stat", "per_pass", "per_token")]
    for recorder in recorders:
        scheduler, _ = serve(model, recorder)
        scheduler.handle(admit(9, [5], new=1))
        run_to_end(scheduler)
        recorder.start()
        for key, prompt in enumerate(prompts):
            scheduler.handle(admit(key, prompt, new=4))
        run_to_end(scheduler)
    stat, per_pass, per_token = (recorder.dump(0) for recorder in recorders)
    total: Counts = {}
    for row in rows_of(per_pass):
        at = int(row["layer_id"]), int(row["expert_id"])
        total[at] = total.get(at, 0) + int(row["count"])
    assert total == counts_of(stat)
    tokens = rows_of(per_token)
    assert list(tokens[0]) == ["forward_pass_id", "token_index", "token_id", "position", "layer_id", "expert_ids"]
    again = dict.fromkeys(total, 0)
    for row in tokens:
        for expert in row["expert_ids"].split(" "):
            again[int(row["layer_id"]), int(expert)] += 1
    assert again == total
    passes = {row["forward_pass_id"] for row in rows_of(per_pass)}
    assert passes == {row["forward_pass_id"] for row in tokens} and "1" not in passes
    first = [row for row in tokens if row["forward_pass_id"] == min(passes, key=int)]
    assert [(row["token_index"], row["token_id"], row["position"], row["layer_id"]) for row in first][:4] == [
        ("0", "10", "0", "0"), ("0", "10", "0", "2"), ("1", "11", "1", "0"), ("1", "11", "1", "2"),
    ]  # fmt: skip
    choices = hooked(load_oracle(folder), [prompts[0]])
    for row in first:
        if int(row["token_id"]) < 50:
            experts = {int(expert) for expert in row["expert_ids"].split(" ")}
            assert experts == choices[int(row["layer_id"])][0][int(row["position"])]


def one_step(recorder: Recorder, expert: int, tokens: int = 1) -> None:
    """A step in which every token takes `expert` and the one after it."""
    zeros = torch.zeros(tokens, dtype=torch.int64)
    batch = RaggedBatch(zeros, zeros, zeros, (0, tokens), (tokens,), zeros, (0, tokens))
    recorder.step(batch, lambda: [np.full((tokens, TOP_K), [expert, expert + 1], np.int32) for _ in LAYERS])


def test_start_stop_and_dump(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = recorder_of(config_of(folder), tmp_path / "a folder that is not there")
    assert set(counts_of(recorder.dump(0)).values()) == {0}
    one_step(recorder, 1)
    recorder.start()
    one_step(recorder, 2)
    with caplog.at_level(logging.WARNING):
        recorder.start()
        assert "already" in caplog.text
    one_step(recorder, 3, tokens=5)
    recorder.stop()
    one_step(recorder, 4)
    first = recorder.dump(0)
    assert {at: n for at, n in counts_of(first).items() if n} == {(0, 3): 5, (0, 4): 5, (2, 3): 5, (2, 4): 5}
    assert set(counts_of(recorder.dump(0)).values()) == {0}
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        recorder.stop()
        assert "not being recorded" in caplog.text
    recorder.start()
    one_step(recorder, 0)
    recorder.dump(0)
    one_step(recorder, 5)  # dumping does not end the recording
    assert {at for at, n in counts_of(recorder.dump(0)).items() if n} == {(0, 5), (0, 6), (2, 5), (2, 6)}
    names = sorted(path.name for path in first.parent.iterdir())
    assert len(names) == 5, "every dump has a file of its own, and nothing else is left"
    assert all(float(name.removeprefix("expert_distribution_rank0_timestamp").removesuffix(".csv")) for name in names)


def test_the_last_passes_are_kept(folder: Path, tmp_path: Path) -> None:
    for passes, kept in ((3, 3), (-1, 1005), (None, 1000)):
        recorder = recorder_of(config_of(folder), tmp_path, passes=passes)
        recorder.start()
        for _ in range(1005 - kept):
            one_step(recorder, 6)
        for _ in range(kept):
            one_step(recorder, 1)
        assert {at: n for at, n in counts_of(recorder.dump(0)).items() if n} == {
            (layer, expert): kept for layer in LAYERS for expert in (1, 2)
        }


def test_a_dense_model_has_only_a_header(tmp_path: Path, folder: Path) -> None:
    dense = read_model_config(ModelSource(name="tiny", kind="folder", path=str(folder)), {"mlp_only_layers": [0, 1, 2]})
    for mode in ("stat", "stat_approx", "per_pass", "per_token"):
        recorder = recorder_of(dense, tmp_path, mode)
        recorder.start()
        tokens = torch.zeros(3, dtype=torch.int64)
        recorder.step(RaggedBatch(tokens, tokens, tokens, (0, 3), (3,), tokens, (0, 3)), list)
        assert recorder.dump(0).read_text().count("\n") == 1


def test_the_folder_and_its_environment(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, mode = config_of(folder), "stat_approx"

    def folder_of(**flags: Any) -> str:
        settings = recorder_settings(ServerConfig(expert_distribution_recorder_mode=mode, **flags), config)
        assert settings is not None and settings.mode == "stat"
        return str(settings.folder)

    assert folder_of() == "/tmp"
    monkeypatch.setenv("SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR", "/somewhere")
    assert folder_of() == "/somewhere"
    assert folder_of(expert_distribution_recorder_dir="/else") == "/else"
    assert recorder_settings(ServerConfig(), config) is None


def test_a_file_that_cannot_be_written_is_an_answer(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    scheduler, sent, _ = simulated_scheduler(50)
    recorder = recorder_of(config_of(folder), tmp_path / "file")
    scheduler.runner = scheduler.steps.runner = Runner(scheduler.runner.program, scheduler.backend, recorder)
    recorder.start()
    one_step(recorder, 1)
    scheduler.handle(RecordExperts(3, "dump"))
    (answer,) = sent.others
    assert answer.key == 3 and f"{str(tmp_path / 'file')!r}: File exists" in answer.error
    assert len(recorder.kept) == 1


def test_a_record_is_the_users_alone(folder: Path, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = recorder_of(config_of(folder), tmp_path / "new").dump(0)
    finally:
        os.umask(before)
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
