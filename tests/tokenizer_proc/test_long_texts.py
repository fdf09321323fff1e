"""Texts far beyond the context: refused, or cut, without being tokenized as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_tokenizer_process import VOCAB, generate, tokenize

from engine.checkpoints import tokenizer_data
from engine.checkpoints.tokenizer import Tokenizer, load_tokenizer
from engine.wire.to_frontend import Accepted, Ended
from engine.wire.to_scheduler import Admit
from engine.wire.to_tokenizer import Embed, Generate
from tests.tokenizer_models import byte_level, source, write_folder
from tokenizer_proc import long_texts, replies
from tokenizer_proc.admission import admit
from tokenizer_proc.long_texts import LONG_TEXT
from tokenizer_proc.validation import Bounds

LONGEST = 40 * LONG_TEXT
BOUNDS, CUTTING = Bounds(VOCAB, 100), Bounds(VOCAB, 100, auto_truncate=True)


@pytest.fixture
def tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """Fails for more than a part of a text that is longer than may be."""
    made = load_tokenizer(source(write_folder(tmp_path, byte_level())))
    well_formed = tokenizer_data._well_formed

    def watched(text: str) -> str:
        assert len(text) <= LONG_TEXT
        return well_formed(text)

    monkeypatch.setattr(tokenizer_data, "_well_formed", watched)
    return made


@pytest.mark.parametrize("kind", ["generate", "embed", "pair"])
def test_texts_far_beyond_the_context(kind: str, tokenizer: Tokenizer) -> None:
    text = "a b" * (LONGEST // 3)
    message: Generate | Embed = generate(1, text)
    if kind != "generate":
        short, pair = ("a", text) if kind == "pair" else (text, None)
        message = Embed(key=1, attempt=0, rid="r1", text=short, pair=pair, input_ids=None)
    refused = admit(message, tokenizer, BOUNDS)
    assert isinstance(refused, Ended) and refused.finish.status == 400
    said = str(refused.finish.message)
    assert said.startswith("The input (at least ") and said.endswith("context length (100 tokens).")
    outcome = admit(message, tokenizer, CUTTING)
    assert not isinstance(outcome, Ended), outcome.finish.message
    accepted, admitted = outcome
    assert isinstance(accepted, Accepted) and isinstance(admitted, Admit)
    assert len(admitted.input_ids) // 4 <= 100


def test_a_long_text_of_few_tokens(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a tokenizer has it that merges blanks, or makes one token of an unknown word."""
    monkeypatch.setattr(long_texts, "encode", lambda *_, **__: [1])
    text = "x" * LONG_TEXT + "y"
    assert long_texts.within_reach(tokenizer, text, BOUNDS) is text


def test_a_chat_that_makes_too_long_a_text(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "render_chat", lambda *_, **__: "x" * (1 << 18) + "y")
    answer = replies.tokenized(tokenize(1, messages=[{"role": "user", "content": "a"}]), tokenizer, 100)
    assert answer.error == "the messages make a text of 262145 characters; at most 262144"
