"""Decoders that embed or classify, against `transformers` in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from backends import FOR_MODELS, backend
from safetensors.torch import load_file, save_file
from test_encoders import POOLED, close, hidden, write_pooling
from tiny_models import load_oracle, tiny_gemma3, tiny_llama, tiny_mistral, tiny_qwen2, tiny_qwen3
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from whole_texts import check_same, load, program, random_texts, vectors

from engine.checkpoints.errors import CheckpointError
from engine.kernels.batch import RaggedBatch
from engine.kernels.kv_cache import allocate_kv_cache

LENGTHS = [9, 1, 40, 2, 33, 17]
FAMILIES: dict[str, Callable[..., Path]] = {
    "llama": tiny_llama,
    "mistral": tiny_mistral,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "gemma3": tiny_gemma3,
}


@pytest.mark.parametrize("name", FOR_MODELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_token_of_a_base_model(family: str, name: str, tmp_path: Path) -> None:
    """Saved without "model." before the names of its tensors, as embedders are on the hub."""
    path = FAMILIES[family](tmp_path, AutoModel)
    oracle, model = load_oracle(path, auto=AutoModel), load(path, backend(name))
    assert (model.task.kind, model.task.normalise, model.reads_whole) == ("embedding", True, False)
    run, texts = program(model), random_texts(model.config.vocab_size, LENGTHS)
    found = vectors(run, texts)
    close(found, torch.stack([hidden(oracle, text)[-1] for text in texts]))
    close(run.pooled(), found)
    for row, text in zip(found, texts, strict=True):
        check_same(name, row, vectors(run, [text])[0])


@pytest.mark.parametrize("name", FOR_MODELS)
def test_a_causal_embedder_may_be_cut_into_chunks(name: str, tmp_path: Path) -> None:
    model = load(tiny_qwen3(tmp_path), backend(name), is_embedding=True)
    (text,) = random_texts(model.config.vocab_size, [30])
    run = model.program(allocate_kv_cache(model.config, 30, torch.float32, "cpu"))
    for start, stop in ((0, 11), (11, 30)):
        batch = RaggedBatch(
            token_ids=text[start:stop],
            positions=torch.arange(start, stop),
            slots=torch.arange(start, stop),
            query_starts=(0, stop - start),
            context_lengths=(stop,),
            context_slots=torch.arange(stop),
            context_starts=(0, stop),
        )
        found = run.run(batch, np.array([stop - start - 1]))
    check_same(name, found, vectors(program(model), [text]))


@pytest.mark.parametrize("name", FOR_MODELS)
@pytest.mark.parametrize("mode", POOLED)
def test_in_both_directions(mode: str, name: str, tmp_path: Path) -> None:
    path = tiny_qwen2(tmp_path, AutoModelForCausalLM, is_causal=False)
    write_pooling(path, mode, {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"})
    oracle, model = load_oracle(path, auto=AutoModel), load(path, backend(name), is_embedding=True)
    assert model.reads_whole and model.task.normalise
    run, texts = program(model), random_texts(model.config.vocab_size, LENGTHS)
    states = [hidden(oracle, text) for text in texts]
    found = vectors(run, texts)
    close(found, torch.stack([POOLED[mode](of) for of in states]))
    check_same(name, found[2], vectors(run, texts[2:3])[0])


@pytest.mark.parametrize("name", FOR_MODELS)
@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma3"])
def test_classifiers(family: str, labels: int, name: str, tmp_path: Path) -> None:
    path = FAMILIES[family](tmp_path, AutoModelForSequenceClassification, num_labels=labels, pad_token_id=3)
    oracle, model = load_oracle(path, auto=AutoModelForSequenceClassification), load(path, backend(name))
    assert (model.task.width, model.task.cross_encoder, model.reads_whole) == (labels, False, False)
    run, texts = program(model), random_texts(model.config.vocab_size, LENGTHS)
    with torch.no_grad():
        expected = torch.stack([oracle(text[None]).logits[0] for text in texts])
    found = vectors(run, texts)
    close(found, expected)
    check_same(name, found[4], vectors(run, texts[4:5])[0])


@pytest.mark.parametrize("name", FOR_MODELS)
def test_rewards(name: str, tmp_path: Path) -> None:
    """Two layers with a relu between them, as Qwen's own reward models have: no class of transformers is theirs."""
    path = tiny_qwen2(tmp_path, AutoModel)
    oracle = load_oracle(path, auto=AutoModel)
    torch.manual_seed(3)
    score = torch.nn.Sequential(torch.nn.Linear(56, 56), torch.nn.ReLU(), torch.nn.Linear(56, 1))
    tensors = {f"model.{key}": value for key, value in load_file(path / "model.safetensors").items()}
    save_file(tensors | {f"score.{key}": v for key, v in score.state_dict().items()}, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen2ForRewardModel"]}))
    model = load(path, backend(name))
    texts = random_texts(model.config.vocab_size, LENGTHS)
    with torch.no_grad():
        close(vectors(program(model), texts), torch.stack([score(hidden(oracle, text)[-1]) for text in texts]))


def test_windows_in_both_directions_are_refused(tmp_path: Path) -> None:
    path = tiny_qwen2(tmp_path, is_causal=False, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    with pytest.raises(CheckpointError, match="is_causal is false, and there are sliding windows"):
        load(path, backend("reference"), is_embedding=True)
