"""A random checkpoint has the tensors that its config asks for, and a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.checkpoints.load_weights import load_weights, open_weights
from engine.checkpoints.locate import locate
from engine.checkpoints.read_config import read_model_config
from engine.checkpoints.tokenizer import decode, encode, load_tokenizer
from engine.checkpoints.weights import TensorPlace
from engine.kernels.eager import EagerBackend
from engine.models.registry import build_model
from scripts.random_checkpoint import SHAPES, write_checkpoint


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_a_checkpoint_of_each_shape_loads(shape: str, tmp_path: Path) -> None:
    small = {"num_hidden_layers": 2, "vocab_size": 600}
    if "num_experts" in SHAPES[shape]:
        small["num_experts"] = 8
    write_checkpoint(tmp_path, {**SHAPES[shape], **small}, seed=1)
    source = locate(str(tmp_path))
    config = read_model_config(source)
    model = build_model(config, dtype=torch.bfloat16, backend=EagerBackend())
    load_weights(open_weights(source, config), model.places, ignore=model.ignored)
    assert config.tie_embeddings and config.dtype == "bfloat16"
    down = "mlp.down_proj" if config.moe is None else "mlp.experts.3.down_proj"
    place = model.places[f"model.layers.1.{down}.weight"]
    assert isinstance(place, TensorPlace) and place.tensor.std() > 0.01
    tokenizer = load_tokenizer(source)
    assert decode(tokenizer, encode(tokenizer, "Straße 7")) == "Straße 7"
