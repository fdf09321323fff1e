"""Tokenizers small enough to make in a test: byte-level BPE, sentencepiece BPE and Unigram, WordPiece."""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from engine.config import ModelSource

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps.",
    "def add(a, b):\n    return a + b  # 12345 + 678",
    "Łódź, Füße, naïve café — «déjà vu»",
    "日本語のテキスト、漢字とかな。日本語、日本。",
    "Hello hello HELLO world, world! 🙂🙃 2024-01-31",
    "stop STOP the end END. the end",
] * 20
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SPECIALS = ["<unk>", "<s>", "</s>", "<|eom_id|>"]


def source(path: Path) -> ModelSource:
    return ModelSource(name="test", kind="gguf" if path.suffix == ".gguf" else "folder", path=str(path))


def write_folder(folder: Path, backend: Tokenizer, **config: object) -> Path:
    """A folder with `backend` as tokenizer.json and the usual roles in tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    roles = {**named, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps({**roles, **config}))
    return folder


def byte_level() -> Tokenizer:
    """Byte-level BPE with BOS in front of a text, and an added token that is not special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def llama_style(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """Sentencepiece BPE as Llama 2 has it: `▁` in front of every text, bytes for unknown characters."""
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIALS[:3]])
    return backend


def metaspace() -> Tokenizer:
    """Unigram with a Metaspace decoder, as T5 and XLM-R have it."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False),
    )
    return backend


def word_piece() -> Tokenizer:
    """A decoder that looks at neighbours, which has no byte table."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))  # type: ignore[arg-type]
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIALS, show_progress=False)
    )
    return backend


def train_sentencepiece(folder: Path, kind: str, *, prefix: bool = True, symbols: tuple[str, ...] = ()) -> Path:
    """A folder that has only a sentencepiece `tokenizer.model`, "bpe" or "unigram", with byte fallback.

    symbols: pieces that are matched before all others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.txt").write_text("\n".join(line for text in CORPUS for line in text.split("\n")))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type=kind,
        vocab_size=380,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        hard_vocab_limit=False,
        minloglevel=2,
        user_defined_symbols=list(symbols),
    )
    (folder / "corpus.txt").unlink()
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    )
    return folder
