"""Tokenizers that only transformers can read: a sentencepiece model, or vocab.json with merges.txt."""

from __future__ import annotations

import tempfile
from pathlib import Path

import tokenizers

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.tokenizer_data import NAMED_TOKENS

# Everything small that transformers may look at; tokenizer.json is kept from it, so that it converts the rest.
_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja")
_HIDDEN = "tokenizer.json"


def convert_folder(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Convert the original tokenizer files of `folder`. Returns (backend, role → text of special tokens).

    Raises CheckpointError when transformers or sentencepiece is not installed, or cannot read the files.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise CheckpointError(f"{folder}: has no tokenizer.json, and converting needs transformers: {error}") from error
    with tempfile.TemporaryDirectory(prefix="tokenmill-tokenizer-") as scratch:
        for pattern in _PATTERNS:
            for file in folder.glob(pattern):
                if file.name != _HIDDEN and not file.name.endswith(".index.json"):
                    (Path(scratch) / file.name).symlink_to(file.resolve())
        try:
            loaded = AutoTokenizer.from_pretrained(scratch, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds; all mean: these files cannot be converted
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{folder}: its tokenizer cannot be converted: {reason}") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise CheckpointError(f"{folder}: {type(loaded).__name__} has no form that the tokenizers package can run")
    named = {name: str(value) for name in NAMED_TOKENS if (value := getattr(loaded, name, None)) is not None}
    return backend, named
