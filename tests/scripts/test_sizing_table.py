"""The sizes of docs/scaling.md: written by the script, and right where they can be had otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_systemd_units import read_unit

from engine.checkpoints.locate import locate
from engine.checkpoints.read_config import read_model_config
from engine.kernels.kv_cache import kv_bytes_per_token
from scripts.sizing import MACHINES, MODELS, most_at_once, rate, shapes, sizing_table, whole

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text()


def test_the_page_has_the_table() -> None:
    table = DOCUMENT.partition("<!-- sizing: begin -->\n")[2].partition("\n<!-- sizing: end -->")[0]
    assert table == sizing_table(), "put the output of python -m scripts.sizing between the marks of docs/scaling.md"


def test_the_default_model_is_of_its_size() -> None:
    model = read_model_config(locate(None))
    assert shapes()["SmolLM2-135M"].kv_bytes == kv_bytes_per_token(model, torch.bfloat16)
    assert whole(shapes()["SmolLM2-135M"]) == pytest.approx(2 * 134.5e6, rel=0.01)


def test_parameters_are_those_that_the_names_say() -> None:
    billions = {name: whole(shape) / 2e9 for name, shape in shapes().items()}
    # Without an untied embedding, of which a step reads a row a token.
    assert billions == pytest.approx(
        {"SmolLM2-135M": 0.135, "Qwen2-0.5B": 0.49, "Llama-3-8B": 7.5, "Llama-3-70B": 69.5, "Qwen3-30B-A3B": 30.2},
        rel=0.02,
    )
    assert billions.keys() == MODELS.keys()


def test_a_batch_grows_until_keys_and_values_dominate() -> None:
    machine, shape = MACHINES[1], shapes()["SmolLM2-135M"]
    rates = [rate(machine, shape, clients) for clients in (1, 2, 8, 64)]
    assert [bound for _, bound in rates] == ["weights", "weights", "KV", "KV"]
    assert rates == sorted(rates, key=lambda one: one[0])
    assert rates[-1][0] < machine.bandwidth / (4096 * shape.kv_bytes)
    assert most_at_once(MACHINES[0], shapes()["Llama-3-70B"]) == 0


def test_the_page_names_the_ports_of_the_units() -> None:
    (command,) = read_unit("tokenmill@.service")["Service"]["ExecStart"]
    assert "--port 300%i" in command
    assert "`tokenmill@01` on port 30001" in DOCUMENT
