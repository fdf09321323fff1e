"""The incremental decoder against the tokenizer's own decoder, over random ids."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from detokenizer_proc.incremental import ByteStream, StreamFactory, WindowStream
from engine.checkpoints.tokenizer import Tokenizer, decode
from engine.checkpoints.tokenizer_data import finish_tokenizer
from tests.tokenizer_models import byte_level, llama_style, metaspace, train_sentencepiece, word_piece


@functools.cache
def sentencepiece_bpe() -> Backend:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        train_sentencepiece(Path(folder), "bpe")
        model = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/tokenizer.model")
    pieces = [model.id_to_piece(index) for index in range(model.get_piece_size())]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [(p[:cut], p[cut:]) for p in pieces for cut in range(1, len(p)) if p[:cut] in vocab and p[cut:] in vocab]
    return llama_style(vocab, merges)


MAKERS = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece_bpe,
    "metaspace": metaspace,
    "word_piece": word_piece,
}


@functools.cache
def made(name: str) -> Tokenizer:
    return finish_tokenizer(MAKERS[name](), named_tokens={"bos_token": "<s>", "eos_token": "</s>"})


def reference(tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    """The tokenizer's own decoding, but with bytes read as UTF-8 stretch by stretch: the byte-fallback decoder turns
    all bytes of a stretch into U+FFFD when one of them is wrong, which would take back what has been shown."""
    backend = tokenizer.backend
    if backend.token_to_id("<0x00>") is None:
        return decode(tokenizer, ids, skip)
    data = b""
    for token in ids:
        text = backend.id_to_token(token)
        if text is None or (skip and token in tokenizer.special_ids):
            continue
        byte = re.fullmatch("<0x(..)>", text)
        data += bytes([int(byte[1], 16)]) if byte else text.replace("▁", " ").encode()
    return data.decode("utf-8", "replace").removeprefix(" ")


@pytest.mark.parametrize("name", MAKERS)
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_deltas_make_the_decoded_output_in_the_context_of_the_prompt(name: str, data: st.DataObject) -> None:
    tokenizer = made(name)
    ids = st.integers(0, tokenizer.vocab_size + 3)
    prompt = data.draw(st.lists(ids, min_size=1, max_size=8), label="prompt")
    output = data.draw(st.lists(ids, max_size=30), label="output")
    skip = data.draw(st.booleans(), label="skip")
    before = reference(tokenizer, prompt, skip)
    if name != "word_piece" and before.endswith("\ufffd"):
        # The prompt ends inside a character, which has a test of its own: put a whole one behind it.
        prompt.append(next(i for i in range(tokenizer.vocab_size) if tokenizer.backend.id_to_token(i) == "e"))
        before = reference(tokenizer, prompt, skip)
    stream = StreamFactory(tokenizer).open(prompt, whole_prompt=True, skip_special_tokens=skip)
    shown = ""
    for number, token in enumerate(output):
        text = stream.table.get(token) if stream.plain else None
        shown += stream.feed(token) if text is None else text
        # What is shown so far is never taken back: it begins every later decoding.
        assert reference(tokenizer, prompt + output[: number + 1], skip)[len(before) :].startswith(shown)
    assert before + shown + stream.flush() == reference(tokenizer, prompt + output, skip)


def test_kinds_of_streams() -> None:
    for name, kind in (("byte_level", ByteStream), ("metaspace", ByteStream), ("word_piece", WindowStream)):
        assert isinstance(StreamFactory(made(name)).open([5], whole_prompt=True, skip_special_tokens=True), kind)


def test_the_output_completes_a_character_that_the_prompt_began() -> None:
    tokenizer = made("sentencepiece")
    ids = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    streams = StreamFactory(tokenizer)
    stream = streams.open(ids[:2], whole_prompt=True, skip_special_tokens=True)
    assert stream.feed(ids[2]) == "€"
    # Where it does not, the prompt's U+FFFD is not the output's.
    stream = streams.open(ids[:2], whole_prompt=True, skip_special_tokens=True)
    word = tokenizer.backend.token_to_id("▁the")
    assert stream.feed(word) + stream.flush() == " the"
    stream = streams.open(ids[:2], whole_prompt=True, skip_special_tokens=True)
    assert stream.flush() == ""


@pytest.mark.parametrize("name", ["sentencepiece", "metaspace"])
def test_the_blank_at_the_start_of_a_text(name: str) -> None:
    tokenizer = made(name)
    word = next(
        i for i in range(tokenizer.vocab_size) if re.fullmatch("▁[a-z]+", tokenizer.backend.id_to_token(i) or "")
    )
    shown = decode(tokenizer, [word])
    streams = StreamFactory(tokenizer)
    bos = tokenizer.bos_id
    assert bos is not None
    assert streams.open([bos], whole_prompt=True, skip_special_tokens=True).feed(word) == shown
    assert streams.open([bos], whole_prompt=True, skip_special_tokens=False).feed(word) == " " + shown
    assert streams.open([bos], whole_prompt=False, skip_special_tokens=True).feed(word) == " " + shown
    assert streams.open([word], whole_prompt=True, skip_special_tokens=True).feed(word) == " " + shown


@pytest.mark.parametrize("token", [-1, -(2**31), 2**31 - 1, 2**40])
@pytest.mark.parametrize("name", MAKERS)
def test_ids_out_of_vocabulary_have_no_text(name: str, token: int) -> None:
    stream = StreamFactory(made(name)).open([5, token], whole_prompt=True, skip_special_tokens=True)
    assert stream.feed(token) + stream.flush() == ""
