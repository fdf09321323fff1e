"""Grammars compiled by llguidance. Nothing is forced: of several ways to spell what must come next all are allowed,
and the model chooses.

This module, the library and the tokenizer are loaded when the first grammar comes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.checkpoints.token_bytes import byte_decoder
from engine.checkpoints.tokenizer import Tokenizer, load_tokenizer
from engine.config import RunConfig
from engine.wire.sampling import Grammar
from scheduler_proc.constraint import Constraint, GrammarError
from scheduler_proc.gbnf import to_lark
from scheduler_proc.structural_tags import read_tags, tags_to_lark

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from llguidance._lib import JsonCompileOptions

ANY_JSON = "$$ANY$$"
"""As a JSON schema: any JSON."""

_HEADER = '%llguidance {"no_forcing": true}\n'

_LISTING = re.compile(r"\n\s*\d+ \| ")
"""What follows in an error is the grammar again, as it was written for llguidance."""
_LONGEST_DETAIL = 1000


@dataclass(frozen=True)
class JsonSpaces:
    """Whitespace between tokens of JSON. pattern: a regular expression, None for any; allowed: False for none."""

    pattern: str | None = None
    allowed: bool = True


@dataclass(frozen=True)
class GrammarEngine:
    """Compiles grammars for one tokenizer. special: ids of special tokens by their text."""

    tokenizer: LLTokenizer
    width: int
    eos_ids: frozenset[int]
    spaces: JsonSpaces
    special: frozenset[str]

    def compile(self, grammar: Grammar) -> Constraint:
        """Compile a grammar; takes milliseconds, or seconds. Raises GrammarError with the contract's message (E40)."""
        from llguidance import LLMatcher, LLParserLimits

        try:
            text = self._written(grammar)
        except (ValueError, RecursionError) as error:
            raise failed(grammar, str(error)) from None
        matcher = LLMatcher(self.tokenizer, text, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if matcher.is_error():
            raise failed(grammar, matcher.get_error())
        return Constraint(matcher, self.width, self.eos_ids)

    def _written(self, grammar: Grammar) -> str:
        """As llguidance reads it. Raises ValueError and RecursionError."""
        match grammar.kind:
            case "json":
                return _list(_HEADER + "start: @inner", {"inner": self._schema(json_schema(grammar.text))})
            case "regex":
                return _list(_HEADER + _regex(grammar.text), {})
            case "ebnf":
                return _list(_HEADER + to_lark(grammar.text), {})
            case "structural_tag":
                tags = read_tags(grammar.text)
                schemas = {f"tag{i}": self._schema(tag.schema) for i, tag in enumerate(tags.tags)}
                return _list(_HEADER + tags_to_lark(tags, self.special), schemas)

    def _schema(self, schema: Any) -> dict[str, Any]:
        from llguidance import LLMatcher

        options: JsonCompileOptions = {"whitespace_flexible": self.spaces.allowed}
        if self.spaces.pattern is not None:
            options["whitespace_pattern"] = self.spaces.pattern
        if not isinstance(schema, dict):
            return {"json_schema": schema}
        return json.loads(LLMatcher.grammar_from_json_schema(schema, overrides=options))["grammars"][0]


def new_engine(tokenizer: Tokenizer, width: int, eos_ids: list[int], spaces: JsonSpaces) -> GrammarEngine:
    """The engine for a model whose logits are `width` wide. Takes a moment, in part with all threads held.

    Raises GrammarError for a tokenizer whose tokens have no bytes of their own.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    decoder = byte_decoder(tokenizer)
    if decoder is None:
        raise GrammarError("Constrained output is not available: the text of this tokenizer's tokens depends on others")
    ends = frozenset(token for token in eos_ids if token < width)
    # Where the model has no end, the one of the grammar is an id that it cannot choose.
    known = [decoder.token_bytes(token) for token in range(width)] + ([] if ends else [b"<end>"])
    first_end = min(ends) if ends else width
    special = sorted({token for token in tokenizer.special_ids if token < width} | ends | {first_end})
    tokens = _Tokens(first_end, None, known, special, _never)
    made = LLTokenizer(
        TokenizerWrapper(tokens), n_vocab=len(known), eos_token=sorted(ends) or [first_end],
        # They speed masks up by what they take to be made, during which no thread can go on.
        slices=[],
    )  # fmt: skip
    texts = (tokenizer.backend.id_to_token(token) for token in special if token < width)
    return GrammarEngine(made, width, ends, spaces, frozenset(text for text in texts if text))


def failed(grammar: Grammar, detail: str) -> GrammarError:
    reason = _LISTING.split(detail, maxsplit=1)[0].strip()
    if len(reason) > _LONGEST_DETAIL:  # it may quote the grammar; what is wrong with it stands behind
        reason = f"{reason[: _LONGEST_DETAIL // 2]} ... {reason[-_LONGEST_DETAIL // 2 :]}"
    return GrammarError(f"Failed to compile {grammar.kind} grammar: {reason}")


def json_schema(text: str) -> Any:
    """Raises ValueError and RecursionError."""
    return {} if text == ANY_JSON else json.loads(text)


def _regex(pattern: str) -> str:
    from llguidance import LLMatcher

    return json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"][0]["lark_grammar"]


def _list(lark: str, parts: dict[str, dict[str, Any]]) -> str:
    """A grammar and those that it refers to by name."""
    return json.dumps(
        {"grammars": [{"name": "top", "lark_grammar": lark}, *(part | {"name": name} for name, part in parts.items())]}
    )


@dataclass(frozen=True)
class _Tokens:
    """A vocabulary as llguidance reads it."""

    eos_token_id: int
    bos_token_id: int | None
    tokens: list[bytes]
    special_token_ids: list[int]
    encode: Callable[[bytes], list[int]]

    def __call__(self, text: bytes) -> list[int]:
        return self.encode(text)


def _never(text: bytes) -> list[int]:
    raise NotImplementedError("nothing is forced, and so no text has to become tokens")


def open_engine(config: RunConfig) -> GrammarEngine:
    """The engine of a launch. Raises GrammarError, and CheckpointError where the tokenizer cannot be loaded."""
    server, source, facts = config.server, config.tokenizer, config.facts
    assert source is not None, "who has no tokenizer asks for no grammar"
    spaces = JsonSpaces(
        server.constrained_json_whitespace_pattern, allowed=not server.constrained_json_disable_any_whitespace
    )
    return new_engine(load_tokenizer(source, mode=server.tokenizer_mode), facts.vocab_size, facts.eos_ids, spaces)
