"""A client's grammar as llguidance reads it. Nothing is forced: of several ways to spell what must come next all are
allowed, and the model chooses."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import msgspec

from engine.wire.sampling import Grammar
from scheduler_proc.gbnf import to_lark
from scheduler_proc.structural_tags import read_tags, tags_to_lark

if TYPE_CHECKING:
    from llguidance import LLParserLimits
    from llguidance._lib import JsonCompileOptions

MOST_STATES = 50_000
ANY_JSON = "$$ANY$$"
"""As a JSON schema: any JSON."""

_HEADER = '%llguidance {"no_forcing": true}\n'

_LISTING = re.compile(r"\n\s*\d+ \| ")
"""What follows in an error is the grammar again, as it was written for llguidance."""
_LONGEST_DETAIL = 1000


class JsonSpaces(msgspec.Struct, frozen=True):
    """Whitespace between tokens of JSON. pattern: a regular expression, None for any; allowed: False for none."""

    pattern: str | None = None
    allowed: bool = True


def written(grammar: Grammar, spaces: JsonSpaces, special: Collection[str]) -> str:
    """special: texts of special tokens. Raises ValueError and RecursionError."""
    match grammar.kind:
        case "json":
            schema = {} if grammar.text == ANY_JSON else json.loads(grammar.text)
            return _list(_HEADER + "start: @inner", {"inner": _schema(schema, spaces)})
        case "regex":
            return _list(_HEADER + _regex(grammar.text), {})
        case "ebnf":
            return _list(_HEADER + to_lark(grammar.text), {})
        case "structural_tag":
            tags = read_tags(grammar.text)
            schemas = {f"tag{i}": _schema(tag.schema, spaces) for i, tag in enumerate(tags.tags)}
            return _list(_HEADER + tags_to_lark(tags, special), schemas)


def limits() -> LLParserLimits:
    """What compiling and a step may cost, and what a constraint may hold: a state is 1 to 2 KB. Errors during a step
    quote nothing of the grammar."""
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=MOST_STATES, verbose_errors=False)


def shortened(detail: str) -> str:
    """What is wrong with a grammar, as far as it is of use to its client."""
    reason = _LISTING.split(detail, maxsplit=1)[0].strip()
    if len(reason) > _LONGEST_DETAIL:  # it may quote the grammar; what is wrong with it stands behind
        reason = f"{reason[: _LONGEST_DETAIL // 2]} ... {reason[-_LONGEST_DETAIL // 2 :]}"
    return reason


def _schema(schema: Any, spaces: JsonSpaces) -> dict[str, Any]:
    from llguidance import LLMatcher

    options: JsonCompileOptions = {"whitespace_flexible": spaces.allowed}
    if spaces.pattern is not None:
        options["whitespace_pattern"] = spaces.pattern
    if not isinstance(schema, dict):
        return {"json_schema": schema}
    return json.loads(LLMatcher.grammar_from_json_schema(schema, overrides=options))["grammars"][0]


def _regex(pattern: str) -> str:
    from llguidance import LLMatcher

    return json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"][0]["lark_grammar"]


def _list(lark: str, parts: dict[str, dict[str, Any]]) -> str:
    """A grammar and those that it refers to by name."""
    return json.dumps(
        {"grammars": [{"name": "top", "lark_grammar": lark}, *(part | {"name": name} for name, part in parts.items())]}
    )
