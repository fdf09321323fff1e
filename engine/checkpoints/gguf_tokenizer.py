"""The tokenizer that the metadata of a GGUF file describes.

Two kinds (`tokenizer.ggml.model`): "gpt2" is byte-level BPE, where `tokenizer.ggml.pre` names the way in which text is
split before merging; "llama" is sentencepiece BPE, where a pair is merged in the order of the scores of the results.
The keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.gguf_pretokenizers import IGNORES_MERGES, NFC_NORMALIZED, pre_tokenizer, starts_with_bos
from engine.checkpoints.tokenizer_data import Tokenizer, finish_tokenizer

# tokenizer.ggml.token_type
_UNKNOWN = 2
_CONTROL = 3
_USER_DEFINED = 4

_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Many files of Gemma 3 name no end of a turn; this token is it.
_GEMMA_TURN = "<end_of_turn>"
_ROLE_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # spelled so in the format
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}


def build_gguf_tokenizer(metadata: dict[str, Any], path: Path) -> Tokenizer:
    """Build the tokenizer from a GGUF file's metadata. `path` is for messages only.

    Raises CheckpointError for metadata that has none, or one of an unknown kind.
    """
    reader = _Metadata(metadata, path)
    kind = reader.need("model", str)
    builders: dict[str, Callable[[_Metadata], tokenizers.Tokenizer]] = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise CheckpointError(f"{path}: tokenizer.ggml.model is {kind!r}; known are {', '.join(sorted(builders))}")
    try:
        backend = builders[kind](reader)
        _add_tokens(backend, reader, unknown_too=kind == "llama")
    except CheckpointError:
        raise
    except Exception as error:  # the package raises bare Exception, for instance for merges of unknown pieces
        raise CheckpointError(f"{path}: its tokenizer cannot be built: {error}") from error
    named = reader.named_tokens()
    backend.post_processor = _bos_and_eos(reader, named, kind)
    template = metadata.get("tokenizer.chat_template")
    return finish_tokenizer(
        backend,
        named_tokens=named,
        extra_eos_ids=gguf_eos_ids(metadata),
        chat_template=template if isinstance(template, str) else None,
        tool_template=metadata.get("tokenizer.chat_template.tool_use"),
    )


def gguf_eos_ids(metadata: dict[str, Any]) -> list[int]:
    """The ids that end a generation: end of sequence, of turn, of message; ascending."""
    values = {metadata.get(f"tokenizer.ggml.{key}") for key in _STOP_KEYS}
    tokens = metadata.get("tokenizer.ggml.tokens")
    if metadata.get("general.architecture") == "gemma3" and isinstance(tokens, list) and _GEMMA_TURN in tokens:
        values.add(tokens.index(_GEMMA_TURN))
    return sorted(value for value in values if isinstance(value, int))


class _Metadata:
    """Typed access to the `tokenizer.ggml` keys."""

    def __init__(self, values: dict[str, Any], path: Path) -> None:
        self.values = values
        self.path = path
        self.tokens: list[str] = self.need("tokens", list)
        types = self.get("token_type", list, None)
        if types is not None and len(types) != len(self.tokens):
            raise CheckpointError(f"{path}: {len(self.tokens)} tokens, but {len(types)} token types")
        self.types: list[int] = types if types is not None else [1] * len(self.tokens)

    def get(self, key: str, kind: type, default: Any) -> Any:
        value = self.values.get(f"tokenizer.ggml.{key}", default)
        if value is not default and not isinstance(value, kind):
            raise CheckpointError(f"{self.path}: tokenizer.ggml.{key} is {type(value).__name__}, not {kind.__name__}")
        return value

    def need(self, key: str, kind: type) -> Any:
        value = self.get(key, kind, None)
        if value is None:
            raise CheckpointError(f"{self.path}: no tokenizer: the metadata has no tokenizer.ggml.{key}")
        return value

    def vocab(self) -> dict[str, int]:
        vocab = {token: index for index, token in enumerate(self.tokens)}
        if len(vocab) != len(self.tokens):
            # Padding of a vocabulary may repeat; the first id of a text is the one that counts.
            for index in range(len(self.tokens) - 1, -1, -1):
                vocab[self.tokens[index]] = index
        return vocab

    def named_tokens(self) -> dict[str, str]:
        named: dict[str, str] = {}
        for name, key in _ROLE_KEYS.items():
            index = self.get(key, int, None)
            if index is None:
                continue
            if not 0 <= index < len(self.tokens):
                raise CheckpointError(
                    f"{self.path}: tokenizer.ggml.{key} is {index}, outside the vocabulary [0, {len(self.tokens)})"
                )
            named[name] = self.tokens[index]
        return named


def _byte_level(reader: _Metadata) -> tokenizers.Tokenizer:
    pre = reader.get("pre", str, "default")
    vocab = reader.vocab()
    merges = _checked_merges(reader, vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in IGNORES_MERGES))
    if pre in NFC_NORMALIZED:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer(pre, reader.path)
    backend.decoder = decoders.ByteLevel()
    return backend


def _checked_merges(reader: _Metadata, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges as pairs. The tokenizers package panics on a merge whose result is no token, so they are checked."""
    merges: list[tuple[str, str]] = []
    for merge in reader.need("merges", list):
        left, blank, right = merge.partition(" ")
        if not blank or left + right not in vocab:
            raise CheckpointError(f"{reader.path}: tokenizer.ggml.merges has {merge!r}, which makes no token")
        merges.append((left, right))
    return merges


def _sentencepiece(reader: _Metadata) -> tokenizers.Tokenizer:
    vocab = reader.vocab()
    byte_fallback = "<0x00>" in vocab and "<0xFF>" in vocab
    unknown = reader.get("unknown_token_id", int, None)
    if unknown is None:
        unknown = reader.types.index(_UNKNOWN) if _UNKNOWN in reader.types else None
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges_from_scores(vocab, reader),
            unk_token=None if unknown is None else reader.tokens[unknown],
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    prefix = reader.get("add_space_prefix", bool, True)
    blanks = normalizers.Replace(" ", "▁")
    # As llama.cpp does: the prefix goes before every stretch of text between special tokens.
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks]) if prefix else blanks
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges_from_scores(vocab: dict[str, int], reader: _Metadata) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, the best-scored pieces first.

    Sentencepiece merges the adjacent pair whose union has the highest score; a list of merges in that order says the
    same. Of several ways to make one piece, those of the earlier (more frequent) parts come first.
    """
    scores = reader.need("scores", list)
    if len(scores) != len(reader.tokens):
        raise CheckpointError(f"{reader.path}: {len(reader.tokens)} tokens, but {len(scores)} scores")
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece, index in vocab.items():
        if reader.types[index] != 1:
            continue
        for cut in range(1, len(piece)):
            left, right = vocab.get(piece[:cut]), vocab.get(piece[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[index], left, right, piece[:cut], piece[cut:]))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _add_tokens(backend: tokenizers.Tokenizer, reader: _Metadata, *, unknown_too: bool) -> None:
    """Control tokens are special; user-defined ones are matched whole in the text, but are text.

    Where these have blanks as sentencepiece writes them (Gemma's runs of blanks), the text is matched in that form.
    """
    special = {_CONTROL, _UNKNOWN} if unknown_too else {_CONTROL}
    tokens = [
        AddedToken(text, special=kind in special, normalized=kind == _USER_DEFINED and unknown_too and "▁" in text)
        for text, kind in zip(reader.tokens, reader.types, strict=True)
        if (kind in special or kind == _USER_DEFINED) and text
    ]
    backend.add_tokens(tokens)


def _bos_and_eos(reader: _Metadata, named: dict[str, str], kind: str) -> Any:
    """The post-processor that puts BOS before a text and EOS behind it, as far as the file wants them."""
    pre = reader.get("pre", str, "default")
    bos = reader.get("add_bos_token", bool, kind == "llama" or starts_with_bos(pre)) and "bos_token" in named
    eos = reader.get("add_eos_token", bool, False) and "eos_token" in named
    ids = {"bos_token": reader.get("bos_token_id", int, None), "eos_token": reader.get("eos_token_id", int, None)}
    used = [name for name, on in (("bos_token", bos), ("eos_token", eos)) if on]
    before = [named["bos_token"]] if bos else []
    behind = [named["eos_token"]] if eos else []
    return processors.TemplateProcessing(
        single=[*before, "$A", *behind],
        pair=[*before, "$A", *behind, *(f"{t}:1" for t in before), "$B:1", *(f"{t}:1" for t in behind)],
        special_tokens=[(named[name], ids[name]) for name in dict.fromkeys(used)],
    )
