"""Load the tokenizer of a checkpoint, in milliseconds: neither torch nor transformers is imported unless a folder has
only files that transformers must convert."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from engine.checkpoints.errors import CheckpointError, makes_sense
from engine.checkpoints.folder_tokenizer import load_folder_tokenizer, read_folder_eos_ids, read_folder_templates
from engine.checkpoints.gguf_file import read_gguf_header
from engine.checkpoints.gguf_tokenizer import build_gguf_tokenizer, gguf_eos_ids
from engine.checkpoints.tokenizer_data import Tokenizer, decode, encode, encode_pair
from engine.config import ModelSource

__all__ = [
    "Tokenizer", "decode", "encode", "encode_pair", "load_tokenizer", "read_chat_template", "read_eos_ids",
]  # fmt: skip


def load_tokenizer(source: ModelSource, *, mode: str = "auto", chat_template: str | None = None) -> Tokenizer:
    """Load the tokenizer at `source`: a folder in Hugging Face layout or a GGUF file.

    mode: "auto" reads tokenizer.json where there is one; "slow" prefers the files it was made from
    (tokenizer.model, or vocab.json and merges.txt) and converts them with transformers.
    chat_template: a file with a Jinja template that replaces the tokenizer's own.
    Raises CheckpointError, which names the path and what is wrong or missing.
    """
    path = Path(source.path)
    with makes_sense(path):
        if source.kind == "gguf":
            tokenizer = build_gguf_tokenizer(read_gguf_header(path).metadata, path)
        else:
            tokenizer = load_folder_tokenizer(path, slow=mode == "slow")
        encode(tokenizer, "a")  # a file may be read well and yet not work
    if chat_template is None:
        return tokenizer
    return dataclasses.replace(tokenizer, chat_template=_read_template(chat_template), tool_template=None)


def read_chat_template(source: ModelSource, chat_template: str | None = None) -> str | None:
    """The chat template that the tokenizer at `source` would have, without loading it; None if it has none.

    chat_template: as in `load_tokenizer`. Raises CheckpointError.
    """
    if chat_template is not None:
        return _read_template(chat_template)
    path = Path(source.path)
    with makes_sense(path):
        return _chat_template(source, path)


def _chat_template(source: ModelSource, path: Path) -> str | None:
    if source.kind == "gguf":
        template = read_gguf_header(path).metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None
    return read_folder_templates(path)[0]


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"chat template {path!r} cannot be read: {error}") from error


def read_eos_ids(source: ModelSource) -> list[int]:
    """The `eos_ids` of the tokenizer at `source`, ascending, without loading the tokenizer as a whole.

    Raises CheckpointError when there is no tokenizer or it cannot be read.
    """
    path = Path(source.path)
    with makes_sense(path):
        if source.kind == "gguf":
            return gguf_eos_ids(read_gguf_header(path).metadata)
        return read_folder_eos_ids(path)
