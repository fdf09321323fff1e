"""Checkpoints that cannot take the place of what serves: refused in the contract's words, and nothing is touched."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import rewritten, tiny_llama
from updates import served

ROLLED_BACK = "\nRolling back to original weights."


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("old") / "model")


def config_change(**fields: Any) -> Callable[[Path, Path], Path]:
    def make(path: Path, target: Path) -> Path:
        shutil.copytree(path, target)
        config = json.loads((target / "config.json").read_text()) | fields
        (target / "config.json").write_text(json.dumps(config))
        return target

    return make


def tensor_change(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path, Path], Path]:
    def make(path: Path, target: Path) -> Path:
        def changed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            value = change(tensors.pop(name))
            return tensors if value is None else tensors | {name: value}

        return rewritten(path, target, changed)

    return make


def cut_short(path: Path, target: Path) -> Path:
    shutil.copytree(path, target)
    os.truncate(target / "model.safetensors", 5000)
    return target


def spoilt_config(text: str) -> Callable[[Path, Path], Path]:
    def make(path: Path, target: Path) -> Path:
        shutil.copytree(path, target)
        (target / "config.json").write_text(text)
        return target

    return make


NORM = "model.norm.weight"
MISFITS: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "eps": (config_change(rms_norm_eps=0.5), "rms_norm_eps is 0.5 instead of 1e-06"),
    "heads": (config_change(num_attention_heads=3, num_key_value_heads=3, head_dim=24), "num_heads is 3 instead of 9"),
    "rope": (config_change(rope_parameters={"rope_type": "default", "rope_theta": 77.0}), "rope is {'theta': 77.0}"),
    "act": (config_change(hidden_act="gelu"), "hidden_act is 'gelu' instead of 'silu'"),
    "tied": (config_change(tie_word_embeddings=True), "tie_embeddings is True instead of False"),
    "shape": (tensor_change(NORM, lambda x: x[:-1]), "misshapen: model.norm.weight [71] instead of [72]"),
    "missing": (tensor_change(NORM, lambda x: None), "missing: model.norm.weight"),
    "dtype": (tensor_change(NORM, lambda x: x.int()), "model.norm.weight is of type I32"),
}
UNOPENED: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "truncated": (cut_short, "model.safetensors"),
    "no weights": (
        lambda path, target: Path(shutil.copytree(path, target, ignore=lambda *_: ["model.safetensors"])),
        "holds no",
    ),
    "config": (spoilt_config("[1]"), "config.json"),
    "fields": (spoilt_config('{"architectures": 7}'), "architectures"),
    "no config": (lambda path, target: (target.mkdir(), target)[1], "holds no config.json and no .gguf file"),
}


def test_what_does_not_fit_touches_nothing(old: Path, tmp_path: Path) -> None:
    one = served(old)
    for name, (make, reason) in MISFITS.items():
        message = one.refused(make(old, tmp_path / name))
        assert message.startswith("Failed to update weights: ") and message.endswith("." + ROLLED_BACK), message
        assert reason in message and ".." not in message, message
    for name, (make, reason) in UNOPENED.items():
        message = one.refused(make(old, tmp_path / name))
        assert message.startswith("Failed to get weights iterator: ") and message.endswith("."), message
        assert reason in message and "\n" not in message and ".." not in message, message
    same = {"rms_norm_eps": 1.0000000001e-06, "eos_token_id": 9, "dtype": "float16", "max_position_embeddings": 77}
    one.update(config_change(**same)(old, tmp_path / "same"))
    one.pump()
    assert one.answer().success, one.answer().message


def test_names_and_formats(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    one = served(old)
    wrong = "qwen/qwen2.5-0.5b-instruct-wrong"
    assert one.refused(wrong) == f"Failed to get weights iterator: {wrong} (repository not found)."
    for path in ("/nothing/here", "a b", ""):
        assert one.refused(path) == f"Failed to get weights iterator: {path} (invalid repository id)."
    for load_format in ("gguf", "dummy", "pt"):
        message = one.refused(old, load_format=load_format)
        assert message.startswith(f"Failed to get model loader: load_format is '{load_format}'"), message
    one.update(old, load_format="safetensors")
    one.pump()
    assert one.answer().success
