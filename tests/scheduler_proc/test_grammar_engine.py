"""Masks against oracles: whatever they let through conforms, and whatever conforms they let through."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from grammar_cases import allowed, compiled, ids_of, random_output, small_engine, text_of
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import EOS, VOCABULARY
from tokenizer_models import byte_level, metaspace, source, train_sentencepiece, word_piece, write_folder

from engine.checkpoints.token_bytes import byte_decoder
from engine.checkpoints.tokenizer import Tokenizer, encode, load_tokenizer
from engine.checkpoints.tokenizer_data import finish_tokenizer
from engine.wire.sampling import GrammarKind
from scheduler_proc.constraint import GrammarError
from scheduler_proc.grammar_engine import new_engine
from scheduler_proc.grammar_text import JsonSpaces

ENGINE = small_engine()
SEEDS = st.integers(0, 2**31)

_ATOMS = st.sampled_from(["a", "b", "ab", "[a-f]", "[^a-y]", "(c|dd|ee)", "[0-9]", "(ca)?"])
PATTERNS = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["?", "{2}", "{0,3}", "{1,2}"])).map(lambda pair: f"({pair[0]}){pair[1]}"),
    ),
    max_leaves=6,
)

_LEAVES = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": "ab"}, {"enum": [1, "x", None, "abc"]}]),
    st.tuples(st.integers(-50, 50), st.integers(0, 200)).map(
        lambda pair: {"type": "integer", "minimum": pair[0], "maximum": pair[0] + pair[1]}
    ),
    st.integers(0, 4).map(lambda most: {"type": "string", "maxLength": most}),
    st.sampled_from(["^a[0-9]{1,3}$", "^(x|yz){0,2}$"]).map(lambda pattern: {"type": "string", "pattern": pattern}),
)


def _object(fields: dict[str, Any], optional: set[str]) -> dict[str, Any]:
    required = [name for name in fields if name not in optional]
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}


SCHEMAS = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.tuples(inner, st.integers(0, 1), st.integers(1, 3)).map(
            lambda t: {"type": "array", "items": t[0], "minItems": t[1], "maxItems": t[2]}
        ),
        st.builds(_object, st.dictionaries(st.sampled_from("abc"), inner, max_size=3), st.sets(st.sampled_from("abc"))),
        st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=5,
)


@given(PATTERNS, SEEDS)
@settings(max_examples=60, deadline=None)
def test_outputs_match_their_pattern(pattern: str, seed: int) -> None:
    text = text_of(random_output(compiled(ENGINE, "regex", pattern), seed))
    assert re.fullmatch(pattern, text), (pattern, text)


@given(PATTERNS, st.data())
@settings(max_examples=60, deadline=None)
def test_all_that_matches_is_allowed(pattern: str, data: st.DataObject) -> None:
    alphabet = st.characters(codec="ascii", categories=["Ll", "Nd"])
    text = data.draw(st.from_regex(re.compile(pattern), fullmatch=True, alphabet=alphabet))
    constraint = compiled(ENGINE, "regex", pattern)
    for token in ids_of(text):
        assert token in allowed(constraint)
        constraint.advance([token])
    assert EOS in allowed(constraint)


@given(SCHEMAS, SEEDS)
@settings(max_examples=60, deadline=None)
def test_outputs_are_valid_under_their_schema(schema: dict[str, Any], seed: int) -> None:
    text = text_of(random_output(compiled(ENGINE, "json", json.dumps(schema)), seed))
    assert jsonschema_rs.is_valid(schema, json.loads(text)), (schema, text)


@given(SCHEMAS, SEEDS, st.integers(0, 12))
@settings(max_examples=30, deadline=None)
def test_a_lost_state_is_had_again_from_the_output(schema: dict[str, Any], seed: int, at: int) -> None:
    fresh = compiled(ENGINE, "json", json.dumps(schema))
    output = random_output(fresh.copy(), seed)[:at]
    stepped, again = fresh.copy(), fresh.copy()
    for token in output:
        stepped.forbidden()
        stepped.advance([token])
    again.advance(output)
    assert allowed(stepped) == allowed(again)
    assert stepped.complete == again.complete


def test_a_complete_grammar_allows_the_end_alone() -> None:
    constraint = compiled(ENGINE, "regex", "ab")
    assert len(allowed(constraint)) == 2  # "a" and "ab": nothing is forced
    constraint.advance(ids_of("ab"))
    assert constraint.complete
    assert allowed(constraint) == [EOS]


def test_a_model_without_an_end_is_done_where_nothing_may_follow() -> None:
    constraint = compiled(small_engine(()), "regex", "ab")
    first, second = ids_of("ab")
    constraint.advance([first])
    assert not constraint.ends_with(first)
    constraint.advance([second])
    assert constraint.ends_with(second)


def test_what_the_grammar_does_not_allow_is_an_error() -> None:
    constraint = compiled(ENGINE, "regex", "ab")
    with pytest.raises(GrammarError, match="does not allow the output"):
        constraint.advance(ids_of("b"))


def test_a_grammar_that_leads_nowhere_is_an_error_of_its_own() -> None:
    constraint = compiled(ENGINE, "ebnf", 'root ::= "a" x\nx ::= x')
    constraint.advance(ids_of("a"))
    with pytest.raises(GrammarError, match="cannot be followed any further"):
        constraint.forbidden()


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("json", "INVALID", "Expecting value: line 1 column 1 (char 0)"),
        ("json", '"INVALID"', "schema must be an object or boolean"),
        ("json", "false", "Unsatisfiable schema"),
        ("json", '{"type":"array","uniqueItems":true}', "uniqueItems"),
        ("json", '{"$ref":"http://example.com/schema"}', "http://example.com/schema"),
        ("json", '{"items":' * 5000 + "{}" + "}" * 5000, "recursion"),
        ("regex", "(a", "unclosed group"),
        ("regex", "(?=a)a", "look-around"),
        ("regex", "(" * 50_000 + ")" * 50_000, "maximum number of nested parentheses"),
        ("ebnf", "nonsense", "Expected ::="),
        ("ebnf", "root ::= missing", "'missing' not found"),
        ("ebnf", 'start ::= "a"', "root"),
        ("ebnf", "root ::= " + "(" * 50_000, "recursion"),
        ("ebnf", r"root ::= [\ud800]", "no character"),
        ("structural_tag", "{}", "structures"),
        ("structural_tag", '{"structures":[],"triggers":["<f"]}', "at least 1 tag"),
        ("structural_tag", '{"structures":[{"begin":"<g>","schema":{},"end":""}],"triggers":["<f"]}', "triggers"),
        ("structural_tag", '{"format":{"type":"other"}}', "triggered_tags"),
    ],
)
def test_a_grammar_that_does_not_compile_says_why(kind: GrammarKind, text: str, reason: str) -> None:
    with pytest.raises(GrammarError) as caught:
        compiled(ENGINE, kind, text)
    message = str(caught.value)
    assert message.startswith(f"Failed to compile {kind} grammar: ")
    assert reason in message and "no_forcing" not in message


def test_any_json() -> None:
    constraint = compiled(ENGINE, "json", "$$ANY$$")
    assert all(_accepts(constraint.copy(), text) for text in ("[1,{}]", '{"a":true}', '"x"', "-1", "null"))
    assert not any(_accepts(constraint.copy(), text) for text in ("x", "[1,]", '{"a"}'))


@pytest.mark.parametrize(
    ("grammar", "accepted", "refused"),
    [
        ('\n    root ::= "ab" | "c"\n', ["ab", "c"], ["a", "abc"]),
        ('root ::= pair ("," pair)*  # a list: "\npair ::= name ":" [0-9]+\nname ::= "a"\n     | "b"  # or\n     | "c"',
         ["a:1", "b:22,c:3"], ["d:1", "a:1,"]),
        (r'root ::= [\u0061-\u0063]{2} "\x64"', ["abd", "ccd"], ["ab", "abc"]),
        ('root ::= "[" root? "]"', ["[]", "[[[]]]"], ["[[]", "]"]),
    ],
)  # fmt: skip
def test_ebnf(grammar: str, accepted: list[str], refused: list[str]) -> None:
    constraint = compiled(ENGINE, "ebnf", grammar)
    assert [_accepts(constraint.copy(), text) for text in accepted] == [True] * len(accepted)
    assert [_accepts(constraint.copy(), text) for text in refused] == [False] * len(refused)


def _accepts(constraint: Any, text: str) -> bool:
    for token in ids_of(text):
        if token not in allowed(constraint):
            return False
        constraint.advance([token])
    return EOS in allowed(constraint)


TAG = {"begin": "fab:", "end": "z"}
CONTENT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
OLD = {"type": "structural_tag", "structures": [{**TAG, "schema": CONTENT}], "triggers": ["fa"]}
NEW_TAG = {**TAG, "content": {"type": "json_schema", "json_schema": CONTENT}}


def _triggered(**options: bool) -> dict[str, Any]:
    return {"format": {"type": "triggered_tags", "triggers": ["fa"], "tags": [NEW_TAG], **options}}


@pytest.mark.parametrize(
    ("tags", "accepted", "refused"),
    [
        (
            OLD,
            ["", "hello", 'xfab:{"a":1}z', 'fab:{"a":1}zyyfab:{"a":22}zend'],
            ['fab:{"b":1}z', "xfac", 'fab:{"a":1}'],
        ),
        (_triggered(), ["hello", 'xfab:{"a":1}zy'], ['fab:{"b":1}z']),
        (_triggered(at_least_one=True), ['xfab:{"a":1}zy'], ["hello", ""]),
        (_triggered(stop_after_first=True), ["hello", 'xfab:{"a":1}z'], ['xfab:{"a":1}zy']),
    ],
)
def test_structural_tags(tags: dict[str, Any], accepted: list[str], refused: list[str]) -> None:
    constraint = compiled(ENGINE, "structural_tag", json.dumps(tags))
    assert [_accepts(constraint.copy(), text) for text in accepted] == [True] * len(accepted)
    assert [_accepts(constraint.copy(), text) for text in refused] == [False] * len(refused)


def test_whitespace_of_json_is_the_servers() -> None:
    tokenizer = finish_tokenizer(byte_level(), named_tokens={"eos_token": "</s>"})
    schema = '{"type":"array","items":{"type":"integer"},"x-guidance":{"whitespace_flexible":true}}'
    for spaces, accepted, refused in (
        (JsonSpaces(), ["[1, 2]", "[1,2]", "[ 1 ,\n2]"], []),
        (JsonSpaces(allowed=False), ["[1,2]"], ["[1, 2]", "[ 1,2]"]),
        (JsonSpaces(pattern=" ?"), ["[1, 2]", "[ 1,2]"], ["[1,  2]", "[1,\n2]"]),
    ):
        engine = new_engine(tokenizer, tokenizer.vocab_size, list(tokenizer.eos_ids), spaces)
        for texts, outcome in ((accepted, True), (refused, False)):
            for text in texts:
                constraint = compiled(engine, "json", schema)
                ids = encode(tokenizer, text, add_special_tokens=False)
                assert _follows(constraint, ids) is outcome, (spaces, text)


def _follows(constraint: Any, ids: list[int]) -> bool:
    try:
        constraint.advance(ids)
    except GrammarError:
        return False
    return True


def _byte_level(folder: Path) -> Tokenizer:
    return load_tokenizer(source(write_folder(folder, byte_level())))


def _sentencepiece(folder: Path) -> Tokenizer:
    return load_tokenizer(source(train_sentencepiece(folder, "bpe")))


@pytest.mark.parametrize("make", [_byte_level, _sentencepiece])
def test_tokenizers_of_both_families(make: Any, tmp_path: Path) -> None:
    tokenizer = make(tmp_path / "model")
    width = tokenizer.vocab_size + 60  # models have more logits than tokens
    engine = new_engine(tokenizer, width, list(tokenizer.eos_ids), JsonSpaces())
    spell = byte_decoder(tokenizer)
    assert spell is not None
    pattern = "( the|über|日本|🙂){1,4}[a-z 0-9]{0,5}"
    for seed in range(20):
        ids = random_output(compiled(engine, "regex", pattern), seed)
        text = b"".join(spell.token_bytes(token) for token in ids).decode()
        assert re.fullmatch(pattern, text), text
    anything = compiled(engine, "regex", r"(.|\n)*")
    usable = allowed(anything)
    assert max(usable) < tokenizer.vocab_size
    assert not (set(tokenizer.special_ids) - set(tokenizer.eos_ids)) & set(usable)


def test_a_tokenizer_whose_tokens_have_no_bytes_is_an_error() -> None:
    with pytest.raises(GrammarError, match="not available"):
        new_engine(finish_tokenizer(word_piece(), named_tokens={}), VOCABULARY, [], JsonSpaces())
    assert new_engine(finish_tokenizer(metaspace(), named_tokens={}), VOCABULARY, [], JsonSpaces()).width == VOCABULARY
