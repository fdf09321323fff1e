"""The tokenizer of a folder in Hugging Face layout.

tokenizer.json is the tokenizer; tokenizer_config.json (in older folders special_tokens_map.json and added_tokens.json)
names the roles of special tokens and may add some. As transformers 5 has it, BOS and EOS are added to a text as the
post-processor in tokenizer.json says: `add_bos_token` and `add_eos_token` count only where there is no tokenizer.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.tokenizer_data import EXTRA_STOP_TOKENS, NAMED_TOKENS, Tokenizer, finish_tokenizer

FAST_FILE = "tokenizer.json"


def load_folder_tokenizer(folder: Path, *, slow: bool) -> Tokenizer:
    """Load from `folder`; `slow`: convert the original files even when there is a tokenizer.json.

    Raises CheckpointError.
    """
    fast = folder / FAST_FILE
    originals = has_original_files(folder)
    if not fast.is_file() and not originals:
        raise CheckpointError(
            f"{folder}: no tokenizer: neither tokenizer.json, nor tokenizer.model, nor vocab.json with merges.txt"
        )
    config = read_json(folder / "tokenizer_config.json")
    if originals and (slow or not fast.is_file()):
        # Imported here: this brings in transformers, seconds that no other folder needs.
        from engine.checkpoints.converted_tokenizer import convert_folder

        backend, named = convert_folder(folder)
    else:
        backend, named = _read_fast(folder, config), _named_tokens(folder, config)
        _add_missing_tokens(backend, folder, config, named)
    default, tool = _chat_templates(folder, config)
    return finish_tokenizer(
        backend,
        named_tokens=named,
        model_max_length=config.get("model_max_length"),
        chat_template=default,
        tool_template=tool,
    )


def has_original_files(folder: Path) -> bool:
    """Whether the folder has the files that a tokenizer.json would have been made from."""
    if (folder / "tokenizer.model").is_file():
        return True
    return (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty when there is no such file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return value


def _read_fast(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    path = folder / FAST_FILE
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception for whatever is wrong with the file
        raise CheckpointError(f"{path}: is not a tokenizer: {error}") from error
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
    return backend


def _named_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Role → text, from the configuration; special_tokens_map.json counts in folders without added_tokens_decoder."""
    values = dict(config)
    if "added_tokens_decoder" not in config:
        values.update(read_json(folder / "special_tokens_map.json"))
    named: dict[str, str] = {}
    for name in NAMED_TOKENS:
        text = _content(values.get(name))
        if text is not None:
            named[name] = text
    return named


def _content(value: Any) -> str | None:
    """A token is written as its text, or as an object with the text under `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, folder: Path, config: dict[str, Any], named: dict[str, str]
) -> None:
    """Add what the configuration lists and tokenizer.json does not have, as transformers does when it loads."""
    known = {token.content: repr(token) for token in backend.get_added_tokens_decoder().values()}
    roles = set(named.values())
    missing: dict[str, tokenizers.AddedToken] = {}
    for token in _configured_tokens(folder, config, roles):
        if known.get(token.content) != repr(token):
            if token.content in roles:
                token.special = True
            missing[token.content] = token
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    listed = extra.values() if isinstance(extra, dict) else extra
    for text in [*named.values(), *(_content(item) for item in listed)]:
        if text is not None and text not in known and text not in missing:
            missing[text] = tokenizers.AddedToken(text, special=True)
    backend.add_tokens(list(missing.values()))


def _configured_tokens(folder: Path, config: dict[str, Any], roles: set[str]) -> list[tokenizers.AddedToken]:
    """The tokens of `added_tokens_decoder`, or of an older folder's added_tokens.json, in the order of their ids."""
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        return [
            tokenizers.AddedToken(entry["content"], **{flag: entry[flag] for flag in flags if flag in entry})
            for _, entry in sorted(decoder.items(), key=lambda item: int(item[0]))
        ]
    older = read_json(folder / "added_tokens.json")
    return [
        tokenizers.AddedToken(text, normalized=text not in roles, special=text in roles)
        for text, _ in sorted(older.items(), key=lambda item: item[1])
    ]


def _chat_templates(folder: Path, config: dict[str, Any]) -> tuple[str | None, str | None]:
    """(default, with tools). Files win over the configuration, where the value is a string or a list of named ones."""
    templates: dict[str, str] = {}
    stored = config.get("chat_template", read_json(folder / "chat_template.json").get("chat_template"))
    if isinstance(stored, str):
        templates["default"] = stored
    elif isinstance(stored, list):
        templates = {item["name"]: item["template"] for item in stored}
    elif isinstance(stored, dict):
        templates = dict(stored)
    files = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if (folder / "chat_template.jinja").is_file():
        files.append(folder / "chat_template.jinja")
    if files:
        named = {file.stem: file.read_text(encoding="utf-8") for file in files}
        templates = {("default" if name == "chat_template" else name): text for name, text in named.items()}
    return templates.get("default"), templates.get("tool_use")


def read_folder_templates(folder: Path) -> tuple[str | None, str | None]:
    """The chat templates of a folder: (default, with tools). Raises CheckpointError."""
    return _chat_templates(folder, read_json(folder / "tokenizer_config.json"))


class _Added(msgspec.Struct):
    id: int
    content: str


class _AddedTokens(msgspec.Struct):
    """What of tokenizer.json tells the ids of special tokens; msgspec skips the rest without building it."""

    added_tokens: list[_Added] = []


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]]


class _Vocabulary(msgspec.Struct):
    model: _Model


def read_folder_eos_ids(folder: Path) -> list[int]:
    """The ids of the EOS token and of EXTRA_STOP_TOKENS, from the smallest files that tell. Raises CheckpointError."""
    config = read_json(folder / "tokenizer_config.json")
    eos = _named_tokens(folder, config).get("eos_token")
    fast = folder / FAST_FILE
    if not fast.is_file():
        return list(load_folder_tokenizer(folder, slow=True).eos_ids)
    try:
        data = fast.read_bytes()
        added = {token.content: token.id for token in msgspec.json.decode(data, type=_AddedTokens).added_tokens}
        wanted = [text for text in (eos, *EXTRA_STOP_TOKENS) if text is not None]
        ids = {added[text] for text in wanted if text in added}
        if eos is not None and eos not in added:
            ids.update(_id_in_vocabulary(data, eos))
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{fast}: is not a tokenizer: {error}") from error
    return sorted(ids)


def _id_in_vocabulary(data: bytes, token: str) -> list[int]:
    vocab = msgspec.json.decode(data, type=_Vocabulary).model.vocab
    if isinstance(vocab, dict):
        return [vocab[token]] if token in vocab else []
    return [token_id for token_id, (text, _) in enumerate(vocab) if text == token]
