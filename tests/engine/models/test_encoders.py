"""Encoders against `transformers` in float32: embeddings, labels of texts and of pairs, and what company does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import FOR_MODELS, backend
from safetensors.torch import load_file, save_file
from tiny_models import load_oracle, tiny_bert, tiny_roberta, tiny_xlm_roberta
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification
from whole_texts import check_same, load, program, random_texts, vectors

from engine.models.model import Model

LENGTHS = [9, 1, 40, 2, 33, 17]
FAMILIES: dict[str, Callable[..., Path]] = {"bert": tiny_bert, "roberta": tiny_roberta, "xlm-roberta": tiny_xlm_roberta}
POOLED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cls": lambda states: states[0],
    "lasttoken": lambda states: states[-1],
    "mean": lambda states: states.mean(0),
    "max": lambda states: states.amax(0),
}
"""sentence-transformers' name of a pooling → the pooled row of hidden states [T, H]."""


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def hidden(oracle: Any, text: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
    states: torch.Tensor = oracle(text[None], **more).last_hidden_state[0]
    return states


def write_pooling(path: Path, mode: str, *modules: dict[str, Any]) -> None:
    """sentence-transformers' files: a pooling in the older style, and more modules behind it."""
    listed = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    listed.append({"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"})
    (path / "modules.json").write_text(json.dumps([*listed, *modules]))
    (path / "1_Pooling").mkdir(exist_ok=True)
    key = {"lasttoken": "pooling_mode_lasttoken", "cls": "pooling_mode_cls_token"}.get(
        mode, f"pooling_mode_{mode}_tokens"
    )
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": False, key: True}))


@pytest.mark.parametrize("name", FOR_MODELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings(family: str, name: str, tmp_path: Path) -> None:
    """Without files of sentence-transformers: the first token's state. A text's vector depends on no other text."""
    path = FAMILIES[family](tmp_path)
    oracle, model = load_oracle(path, auto=AutoModel), load(path, backend(name))
    assert model.reads_whole
    run, texts = program(model), random_texts(model.config.vocab_size, LENGTHS)
    found = vectors(run, texts)
    assert found.dtype == torch.float32
    close(run.pooled(), found)
    close(found, torch.stack([hidden(oracle, text)[0] for text in texts]))
    for row, text in zip(found, texts, strict=True):
        check_same(name, row, vectors(run, [text])[0])
    check_same(name, vectors(run, texts[::-1]).flip(0), found)


@pytest.mark.parametrize("name", FOR_MODELS)
@pytest.mark.parametrize("mode", POOLED)
def test_poolings(mode: str, name: str, tmp_path: Path) -> None:
    path = tiny_bert(tmp_path)
    write_pooling(path, mode)
    oracle, model = load_oracle(path, auto=AutoModel), load(path, backend(name))
    assert not model.task.normalise
    run, texts = program(model), random_texts(model.config.vocab_size, LENGTHS)
    found = vectors(run, texts)
    close(found, torch.stack([POOLED[mode](hidden(oracle, text)) for text in texts]))
    check_same(name, found[2], vectors(run, texts[2:3])[0])


@pytest.mark.parametrize("name", FOR_MODELS)
@pytest.mark.parametrize("activation", ["Tanh", "Identity"])
def test_dense_layers_behind_the_pooling(activation: str, name: str, tmp_path: Path) -> None:
    path = tiny_bert(tmp_path)
    write_pooling(path, "mean", {"path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (path / "2_Dense").mkdir()
    layer = {"in_features": 48, "out_features": 20, "bias": True}
    layer["activation_function"] = (
        f"torch.nn.modules.{'linear' if activation == 'Identity' else 'activation'}.{activation}"
    )
    (path / "2_Dense" / "config.json").write_text(json.dumps(layer))
    torch.manual_seed(4)
    linear = torch.nn.Linear(48, 20)
    save_file(
        {f"linear.{key}": value for key, value in linear.state_dict().items()}, path / "2_Dense/model.safetensors"
    )
    oracle, model = load_oracle(path, auto=AutoModel), load(path, backend(name))
    assert model.task.width == 20
    texts = random_texts(model.config.vocab_size, LENGTHS)
    run = program(model)
    found = vectors(run, texts)
    pooled = torch.stack([hidden(oracle, text).mean(0) for text in texts])
    with torch.no_grad():
        expected = linear(pooled)
    close(found, expected if activation == "Identity" else expected.tanh())
    close(run.pooled(), pooled)


@pytest.mark.parametrize("name", FOR_MODELS)
@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_of_texts_and_pairs(family: str, labels: int, name: str, tmp_path: Path) -> None:
    path = FAMILIES[family](tmp_path, AutoModelForSequenceClassification, num_labels=labels)
    oracle, model = load_oracle(path, auto=AutoModelForSequenceClassification), load(path, backend(name))
    assert (model.task.width, model.task.cross_encoder, model.task.normalise) == (labels, labels == 1, False)
    texts = random_texts(model.config.vocab_size, LENGTHS)
    second = int(family == "bert")  # RoBERTa tells no segments apart
    types = [(torch.arange(len(text)) >= len(text) // 3).long() * second for text in texts]
    run = program(model)
    with torch.no_grad():
        expected = torch.stack(
            [oracle(text[None], token_type_ids=kinds[None]).logits[0] for text, kinds in zip(texts, types, strict=True)]
        )
    found = vectors(run, texts, types)
    close(found, expected)
    check_same(name, found[4], vectors(run, texts[4:5], types[4:5])[0])
    with torch.no_grad():
        expected = torch.stack([oracle(text[None]).logits[0] for text in texts])
    close(vectors(run, texts), expected)


def same(model: Model, other: Model, texts: list[torch.Tensor]) -> bool:
    return torch.equal(vectors(program(model), texts), vectors(program(other), texts))


@pytest.mark.parametrize("family", FAMILIES)
def test_names_with_and_without_the_prefix(family: str, tmp_path: Path) -> None:
    """A masked LM's checkpoint, the base model's, and one with TensorFlow's names of norms are the same embedder."""
    path = FAMILIES[family](tmp_path / "masked", AutoModelForMaskedLM)
    model = load(path, backend("reference"), is_embedding=True)
    bare = tmp_path / "bare"
    AutoModel.from_pretrained(path).save_pretrained(bare)
    old = tmp_path / "old"
    AutoModel.from_pretrained(path).save_pretrained(old)
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(old / "model.safetensors").items()
    }
    save_file(renamed, old / "model.safetensors")
    assert any(".gamma" in name for name in renamed)
    texts = random_texts(model.config.vocab_size, LENGTHS)
    for other in (bare, old):
        assert same(model, load(other, backend("reference")), texts)


def test_activations(tmp_path: Path) -> None:
    for name in ("relu", "gelu_new", "silu"):
        path = tiny_bert(tmp_path / name, hidden_act=name)
        oracle, model = load_oracle(path, auto=AutoModel), load(path, backend("reference"))
        texts = random_texts(model.config.vocab_size, [12])
        close(vectors(program(model), texts), hidden(oracle, texts[0])[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FOR_MODELS)
def test_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """No further from the float32 result than `transformers` itself comes in that dtype."""
    path = tiny_bert(tmp_path, num_labels=3, auto=AutoModelForSequenceClassification)
    oracle, half = (load_oracle(path, of, AutoModelForSequenceClassification) for of in (torch.float32, dtype))
    model = load(path, backend(name), dtype)
    texts = random_texts(model.config.vocab_size, [30] * 10)
    with torch.no_grad():
        exact, theirs = (torch.stack([m(text[None]).logits[0].float() for text in texts]) for m in (oracle, half))
    found = vectors(program(model), texts)
    assert (found - exact).square().mean() <= 1.5 * (theirs - exact).square().mean()
