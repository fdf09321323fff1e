"""The table, its picture, and what part of the machine's limits a row has reached."""

from __future__ import annotations

import dataclasses
import json
import math
from array import array
from pathlib import Path

import msgspec
import pytest

from engine.bench.chart import draw
from engine.bench.errors import BenchError
from engine.bench.figures import row_figures
from engine.bench.http_client import Generation
from engine.bench.load import Round
from engine.bench.options import parse_bench
from engine.bench.report import Report, table_text, write_json
from engine.bench.roofline import measure, reached, shape_of
from engine.bench.run import shown_options
from engine.bench.server import Facts
from engine.bench.transformers_run import their_figures
from engine.bench.workload import rows_of
from engine.checkpoints.read_config import read_model_config
from engine.config import ModelSource
from engine.kernels.roofline import Roofline
from scripts.random_checkpoint import SHAPES, tensors_of

MACHINE = Roofline(threads=2, isa="avx512", read_bandwidth=20e9, matmul={"float32": 100e9, "bfloat16": 200e9})


@pytest.fixture
def facts(tmp_path: Path) -> Facts:
    """Of a model of SmolLM2-135M's shape."""
    config = {**SHAPES["smollm2-135m"], "tie_word_embeddings": True, "hidden_act": "silu"}
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(config))
    source = ModelSource(name="smol", kind="folder", path=str(tmp_path))
    return Facts("smol", "bfloat16", "bfloat16", 2, 8192, source, read_model_config(source))


@pytest.fixture
def report(facts: Facts) -> Report:
    """A prefill of 100 tokens in 0.5 s, 1 and 200 clients at 20 ms a token, Poisson arrivals; 10 tokens in, 5 out."""
    words = "--prompt-tokens 10 --output-tokens 5 --prefill 100 --concurrency 1,200 --request-rate 3 --num-requests 2"
    options = parse_bench([*words.split(), "--rounds", "1"])
    works = rows_of(options)
    rows = []
    for work in works:
        events = [0.5] if work.kind == "prefill" else [0.1, 0.12, 0.14, 0.16, 0.18]
        prompt = 100 if work.kind == "prefill" else 10
        one = Generation(0.0, events[-1], array("d", events), prompt, 0, len(events))
        rows.append(row_figures(work, [Round([one] * work.requests, events[-1], 0.01)]))
    asked = [work for work in works if work.kind != "poisson"]
    theirs = [their_figures(work, [work.requests * 10], [0.18 * work.requests]) for work in asked]
    return Report(
        tokenmill="0",
        created="2026-01-01T00:00:00+00:00",
        url="http://127.0.0.1:1",
        model="smol",
        dtype="bfloat16",
        threads=2,
        options=shown_options(options),
        rows=rows,
        transformers=theirs,
        roofline=reached(MACHINE, facts, rows),
        notes=["A note."],
    )


def test_the_shape_counts_every_weight_that_a_token_is_multiplied_with(facts: Facts) -> None:
    assert facts.model is not None
    shape = shape_of(facts.model, "bfloat16", "float32")
    norms = 61 * 576
    assert shape.layer_parameters + shape.head_parameters == 134_515_008 - norms  # the model's known size
    assert shape.weight_bytes == 2 * (134_515_008 - norms)
    assert shape.kv_bytes == 4 * 2 * 30 * 3 * 64


def test_of_experts_those_count_that_tokens_take(tmp_path: Path) -> None:
    shape = SHAPES["moe-1.7b"]
    (tmp_path / "config.json").write_text(json.dumps({**shape, "tie_word_embeddings": True}))
    config = read_model_config(ModelSource(name="moe", kind="folder", path=str(tmp_path)))
    found = shape_of(config, "bfloat16", "bfloat16")
    sizes = {name: math.prod(size) for name, size in tensors_of(shape).items() if "norm" not in name}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    rest = sum(sizes.values()) - experts
    assert found.layer_parameters + found.head_parameters == rest + experts * 8 // 64
    assert found.bytes_a_step(1) == pytest.approx(2 * (rest + experts * 8 / 64))
    assert found.bytes_a_step(2) == pytest.approx(2 * (rest + experts * (1 - (7 / 8) ** 2)))
    assert found.bytes_a_step(1000) == pytest.approx(2 * sum(sizes.values()))


def test_each_row_is_held_against_the_lower_limit(report: Report, facts: Facts) -> None:
    assert report.roofline is not None and facts.model is not None
    shape = shape_of(facts.model, "bfloat16", "bfloat16")
    prefill, one, many = report.roofline.rows
    parameters = shape.layer_parameters + shape.head_parameters
    assert prefill.bound_by == many.bound_by == "matrix throughput"
    assert prefill.bound_tok_s == pytest.approx(200e9 / (2 * (shape.layer_parameters + shape.head_parameters / 100)))
    assert (prefill.end_to_end_tok_s, prefill.decode_tok_s) == (pytest.approx(200), None)
    assert one.bound_by == "read bandwidth"
    assert one.bound_tok_s == pytest.approx(20e9 / (shape.weight_bytes + 12.5 * shape.kv_bytes))
    assert one.decode_tok_s == pytest.approx(50)
    assert one.decode_fraction == pytest.approx(50 / one.bound_tok_s)
    assert one.end_to_end_tok_s == pytest.approx(5 / 0.18)
    assert many.bound_tok_s == pytest.approx(200e9 / (2 * parameters))


def test_the_table_says_it_all(report: Report) -> None:
    text = table_text(report)
    for said in (
        "smol, bfloat16, 2 threads, http://127.0.0.1:1",
        "TTFT p50/p99 ms",
        "prefill 100         1           200             –",
        "100 / 100     20.0 / 20.0",
        "The client used 0.04 s of CPU in",
        "A note.",
        "reads 20.0 GB/s, multiplies float32 100 GFLOP/s, bfloat16 200 GFLOP/s",
        "read bandwidth",
        "tok/s at median ITL",
    ):
        assert said in text, text
    ratios = text[text.index("Against transformers") : text.index("This machine")]
    assert "1.00" in next(line for line in ratios.splitlines() if line.startswith("1 client"))
    assert "a second" not in ratios


def test_files_are_written_or_their_option_is_named(report: Report, tmp_path: Path) -> None:
    write_json(report, tmp_path / "figures.json")
    assert msgspec.json.decode((tmp_path / "figures.json").read_bytes(), type=Report) == report
    draw(report, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    for write, option in ((write_json, "--json"), (draw, "--png")):
        with pytest.raises(BenchError, match=option):
            write(report, tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"threads": None}, "threads"),
        ({"model": None}, "smol"),
        ({"dtype": "auto"}, "dtype is 'auto'; known are float32"),
        ({"kv_dtype": "fp8"}, "kv_cache_dtype is 'fp8'"),
    ],
)
def test_a_roofline_without_what_it_needs_is_refused_by_name(
    facts: Facts, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(BenchError, match=said):
        measure(dataclasses.replace(facts, **changes))  # type: ignore[arg-type]
