"""Tokenizers of folders against transformers' AutoTokenizer, over random text."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from engine.checkpoints.chat_template import ChatTemplateError, render_chat
from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.tokenizer import Tokenizer, decode, encode, load_tokenizer, read_eos_ids
from tests.tokenizer_models import CORPUS, SPECIALS, byte_level, metaspace, source, train_sentencepiece, write_folder

TEXT = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from([*SPECIALS, *CORPUS[:6], " ", "  ", "\n", "<think>", "<extra>", "12", "日", "🙂"]), max_size=6
    ).map("".join),
)


def _bare_eos() -> Backend:
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return backend


def _no_processor() -> Backend:
    backend = byte_level()
    document = json.loads(backend.to_str())
    document["post_processor"] = None
    document["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    return Backend.from_str(json.dumps(document))


EXTRA = {"content": "<extra>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
FOLDERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "byte_level": (byte_level, {}),
    "flags_beside_a_processor": (byte_level, {"add_bos_token": False, "add_eos_token": True}),
    "eos_processor": (_bare_eos, {}),
    "flags_without_processor": (_no_processor, {"add_bos_token": True, "add_eos_token": True}),
    "added_tokens": (
        byte_level,
        {"added_tokens_decoder": {"500": {**EXTRA, "special": True}}, "pad_token": "<pad>"},
    ),
    "extra_tokens": (
        byte_level,
        {"additional_special_tokens": ["<extra>"], "eos_token": {"__type": "AddedToken", "content": "<|eom_id|>"}},
    ),
    "unigram": (metaspace, {"model_max_length": 1000000000000000019884624838656}),
}


@functools.cache
def loaded(name: str) -> tuple[Tokenizer, Any]:
    """Our tokenizer and transformers' of the same folder."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if name in FOLDERS:
            make, config = FOLDERS[name]
            write_folder(folder, make(), **config)
        else:
            train_sentencepiece(folder, name.removeprefix("sentencepiece_"))
        return load_tokenizer(source(folder)), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", [*FOLDERS, "sentencepiece_bpe"])
@given(text=TEXT, special=st.booleans())
@settings(max_examples=150, deadline=None)
def test_same_ids_and_text_as_transformers(name: str, text: str, special: bool) -> None:
    ours, theirs = loaded(name)
    ids = encode(ours, text, add_special_tokens=special)
    kept = theirs(text, add_special_tokens=special, truncation=False, padding=False)["input_ids"]
    assert ids == kept
    assert decode(ours, ids, special) == theirs.decode(ids, skip_special_tokens=special)


@pytest.mark.parametrize("name", [*FOLDERS, "sentencepiece_bpe"])
def test_same_roles_as_transformers(name: str) -> None:
    ours, theirs = loaded(name)
    stops = {theirs.eos_token_id, theirs.get_added_vocab().get("<|eom_id|>")} - {None}
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_token_id, tuple(sorted(stops)))
    assert ours.vocab_size == len(theirs)
    assert ours.special_ids == set(theirs.all_special_ids) | {
        token_id for token_id, token in theirs.added_tokens_decoder.items() if token.special
    }
    assert ours.model_max_length == (theirs.model_max_length if theirs.model_max_length < 2**63 else None)


@pytest.mark.parametrize("name", FOLDERS)
def test_eos_ids_without_loading(name: str, tmp_path: Path) -> None:
    make, config = FOLDERS[name]
    folder = write_folder(tmp_path, make(), **config)
    assert read_eos_ids(source(folder)) == list(load_tokenizer(source(folder)).eos_ids)


def test_an_eos_that_is_not_an_added_token(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, byte_level(), eos_token="!")
    assert read_eos_ids(source(folder)) == list(load_tokenizer(source(folder)).eos_ids)
    assert len(read_eos_ids(source(folder))) == 2


def test_slow_mode_converts_the_original_files(tmp_path: Path) -> None:
    folder = train_sentencepiece(tmp_path, "bpe")
    expected = encode(load_tokenizer(source(folder)), "The quick 日本語 fox ☃")
    byte_level().save(str(folder / "tokenizer.json"))
    assert encode(load_tokenizer(source(folder), mode="slow"), "The quick 日本語 fox ☃") == expected
    assert encode(load_tokenizer(source(folder)), "The quick 日本語 fox ☃") != expected
    assert not list(folder.glob("*.tmp"))


def test_vocab_and_merges_are_converted(tmp_path: Path) -> None:
    backend = byte_level()
    document = json.loads(backend.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(document["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in document["merges"]) + "\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(source(tmp_path))
    backend.post_processor = None  # type: ignore[assignment]
    text = "The quick brown fox — 日本 12"
    assert encode(ours, text) == backend.encode(text).ids
    assert ours.eos_ids == (2,) == tuple(read_eos_ids(source(tmp_path)))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no tokenizer"),
        ({"tokenizer.json": "{"}, "tokenizer.json"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "[]"}, "not a JSON object"),
        ({"tokenizer.model": "nonsense"}, "cannot be converted"),
    ],
)
def test_unreadable_folders_are_named(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_tokenizer(source(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_lone_surrogates_do_not_matter(tmp_path: Path) -> None:
    ours = load_tokenizer(source(write_folder(tmp_path, byte_level())))
    assert encode(ours, "a\ud800b") == encode(ours, "a\ufffdb")
    assert encode(ours, "\ud83d\ude42") == encode(ours, "🙂")


def test_loading_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, byte_level())
    code = (
        "import sys; from engine.checkpoints.tokenizer import *; from engine.config import ModelSource\n"
        f"source = ModelSource(name='t', kind='folder', path={str(folder)!r})\n"
        "load_tokenizer(source); read_eos_ids(source)\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


MESSAGES = [
    {"role": "system", "content": " be brief "},
    {"role": "user", "content": '<b>hi</b> "there"'},
    {"role": "assistant", "content": "It is "},
]
TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}\n  {% if m.role != 'system' %}\n{{ m.role }}: {{ m.content }}\n"
    "  {% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    "{% for m in messages %}{% if loop.index == 9 %}{% break %}{% endif %}"
    "{{ m.content | trim }}{{ eos_token }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}{{ tools | tojson }}",
    "{{ messages | tojson(indent=2) }}{{ messages[0].content }}{{ strftime_now('%Y') }}{{ flavour }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{{ ns.n }}{{ m.content }}{% endfor %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": True}, {"continue_final_message": True}])
def test_chats_render_as_in_transformers(tmp_path: Path, template: str, options: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    folder = write_folder(tmp_path, byte_level(), chat_template=template)
    tools = [{"type": "function", "function": {"name": "f"}}]
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(source(folder))
    given_ = {"tools": tools, **options}
    try:
        expected = theirs.apply_chat_template(MESSAGES, tokenize=False, flavour="mint", **given_)
    except ValueError:
        with pytest.raises(ChatTemplateError):
            render_chat(ours, MESSAGES, template_kwargs={"flavour": "mint"}, **given_)
        return
    assert render_chat(ours, MESSAGES, template_kwargs={"flavour": "mint"}, **given_) == expected


def test_named_templates_and_files(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    folder = write_folder(tmp_path / "a", byte_level(), chat_template=named)
    tokenizer = load_tokenizer(source(folder))
    assert render_chat(tokenizer, []) == "plain"
    assert render_chat(tokenizer, [], tools=[{}]) == "tools"
    (folder / "chat_template.jinja").write_text("file")
    assert render_chat(load_tokenizer(source(folder)), [], tools=[{}]) == "file"
    own = tmp_path / "own.jinja"
    own.write_text("mine")
    assert render_chat(load_tokenizer(source(folder), chat_template=str(own)), []) == "mine"
    with pytest.raises(CheckpointError, match=r"nowhere\.jinja"):
        load_tokenizer(source(folder), chat_template=str(tmp_path / "nowhere.jinja"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[9].content.x }}",
        "{{ ''.__class__.__mro__ }}",
        "{% if %}",
        "{{ 1/0 }}",
    ],
)
def test_a_template_that_fails_is_an_error(tmp_path: Path, template: str) -> None:
    tokenizer = load_tokenizer(source(write_folder(tmp_path, byte_level(), chat_template=template)))
    with pytest.raises(ChatTemplateError):
        render_chat(tokenizer, [])
