"""What the tokenizer process makes of the question whether a document answers a query."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from engine.checkpoints.tokenizer import Tokenizer, decode, encode, load_tokenizer
from engine.wire.results import Finish
from engine.wire.sampling import LogprobOptions, Sampling, TextOptions
from engine.wire.to_frontend import Accepted, Ended
from engine.wire.to_scheduler import Admit
from engine.wire.to_tokenizer import Judge
from tests.process_ends import running
from tests.tokenizer_models import byte_level, source, write_folder
from tokenizer_proc.admission import admit
from tokenizer_proc.validation import RESERVED_TOKENS, Bounds

OPENING = 'Is it an answer? The answer can only be "yes" or "no".\n'
BY_PLACE = (
    "{%- set instruct = instruct | default('find it') -%}"
    + OPENING
    + "I: {{ instruct }}\nQ: {{ messages[0]['content'] }}\nD: {{ messages[1].content }}<end>"
)
BY_ROLE = (
    OPENING
    + "I: {{ messages | selectattr('role', 'eq', 'system') | map(attribute='content') | first | default('find it') }}\n"
    "Q: {{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}\n"
    "D: {{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}<end>"
)
BY_NAME = OPENING + "I: {{ instruction or 'find it' }}\nQ: {{ query }}\nD: {{ document }}<end>"


def make(folder: Path, template: str, words: tuple[str, ...] = ("yes", "no")) -> Tokenizer:
    backend = byte_level()
    backend.add_tokens([AddedToken(word, normalized=False) for word in words])
    return load_tokenizer(source(write_folder(folder, backend, chat_template=template)))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make(tmp_path_factory.mktemp("judge"), BY_PLACE)


def judge(query: str, document: str, instruct: str | None = None) -> Judge:
    return Judge(key=4, attempt=1, rid="r", query=query, document=document, instruct=instruct, priority=2)


def admitted(message: Judge, tokenizer: Tokenizer, context: int = 4096, *, cut: bool = False) -> Admit:
    outcome = admit(message, tokenizer, Bounds(tokenizer.vocab_size, context, auto_truncate=cut))
    assert not isinstance(outcome, Ended), outcome
    accepted, one = outcome
    assert accepted == Accepted(4, 1, one.input_ids, accepted.at)
    return one


def refused(message: Judge, tokenizer: Tokenizer | None, context: int = 4096) -> str:
    outcome = admit(message, tokenizer, Bounds(10**6, context))
    assert isinstance(outcome, Ended) and (outcome.finish.status, outcome.origin) == (400, "door")
    return str(outcome.finish.message)


@pytest.mark.parametrize("template", [BY_PLACE, BY_ROLE, BY_NAME])
@pytest.mark.parametrize("instruct", [None, "be strict"])
def test_a_template_finds_the_texts_its_own_way(tmp_path: Path, template: str, instruct: str | None) -> None:
    tokenizer = make(tmp_path, template)
    one = admitted(judge("what is it?", "a dog", instruct), tokenizer)
    text = f"{OPENING}I: {instruct or 'find it'}\nQ: what is it?\nD: a dog<end>"
    assert array("i", one.input_ids).tolist() == encode(tokenizer, text, add_special_tokens=False)
    yes, no = (tokenizer.backend.token_to_id(word) for word in ("yes", "no"))
    assert one.logprobs == LogprobOptions(ids=[yes, no])
    assert (one.sampling, one.text_options) == (Sampling(max_new_tokens=0), TextOptions())
    assert (one.key, one.attempt, one.rid, one.priority, one.vector) == (4, 1, "r", 2, None)


def test_what_cannot_be_asked(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert refused(judge("q", "d"), None).startswith("The engine initialized with skip_tokenizer_init=True cannot")
    few = make(tmp_path / "few", BY_PLACE, words=("yes",))
    assert refused(judge("q", "d"), few) == (
        '"no" must be one token for this model to judge documents; its tokenizer makes 2 of it'
    )
    broken = make(tmp_path / "broken", "{{ raise_exception('no such role') }}")
    assert refused(judge("q", "d"), broken) == "the chat template failed: TemplateError: no such role"
    outcome = admit(judge("q" * 400, "d"), tokenizer, Bounds(10**6, 99, auto_truncate=True))
    assert isinstance(outcome, Ended) and "tokens without the document; at most 92" in str(outcome.finish.message)
    assert "longer than the model's context length (40 tokens)" in refused(judge("q", "d" * 400), tokenizer, 40)


@given(st.text(min_size=1, max_size=120), st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_a_document_that_is_too_long_loses_its_end_and_the_question_stays(
    tokenizer: Tokenizer, document: str, room: int
) -> None:
    empty = len(array("i", admitted(judge("q?", ""), tokenizer).input_ids))
    context = empty + 20 + room
    one = admitted(judge("q?", document), tokenizer, context, cut=True)
    ids = array("i", one.input_ids).tolist()
    assert len(ids) <= context - RESERVED_TOKENS
    shown = decode(tokenizer, ids, skip_special_tokens=False)
    assert shown.startswith(OPENING) and shown.endswith("<end>")
    kept = shown.partition("\nD: ")[2].removesuffix("<end>")
    assert document.startswith(kept)
    whole = array("i", admitted(judge("q?", document), tokenizer).input_ids).tolist()
    assert ids == whole or len(whole) > context - RESERVED_TOKENS


def test_over_the_sockets(tmp_path: Path) -> None:
    template = "{% if query == 'bad' %}{{ raise_exception('bad') }}{% endif %}" + BY_NAME
    size = make(tmp_path, template).vocab_size
    with running("tokenizer_proc", "tokenizer", source(tmp_path), size, 200) as (ends, _):
        ends.send(judge("bad", "d"))
        ended = ends.take("frontend")
        finish = Finish("abort", message="the chat template failed: TemplateError: bad", status=400)
        assert ended == Ended(4, 1, finish, "door")
        ends.send(judge("good", "d"))
        assert ends.take("frontend").input_ids == ends.take("scheduler").input_ids
