"""Grammars in the notation of llama.cpp (GBNF), which is also xgrammar's EBNF, as llguidance wants them."""

from __future__ import annotations

import re

_TOKEN = re.compile(
    r"""(?P<string>"(?:\\.|[^"\\])*")|(?P<characters>\[(?:\\.|[^\]\\])*\])|(?P<comment>\#[^\n]*)""",
    re.DOTALL | re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)
_NEXT_ALTERNATIVE = re.compile(r"\s*\n\s*\|")


def to_lark(text: str) -> str:
    """The rules of a grammar, whose first is called root, in Lark's notation. Raises ValueError and RecursionError."""
    from llguidance.gbnf_to_lark import gbnf_to_lark

    plain = _outside_strings(_TOKEN.sub(_plain, text))
    try:
        lark = gbnf_to_lark(plain)
    except (RecursionError, ValueError):
        raise
    except Exception as error:  # the converter raises many kinds; all mean: this is no such grammar
        raise ValueError(str(error)) from None
    return lark.removeprefix("%llguidance {}")


def _plain(token: re.Match[str]) -> str:
    """Without comments, and with characters in place of their numbers, where these are no ASCII."""
    if token["comment"] is not None:
        return ""
    return _ESCAPE.sub(_character, token[0])


def _character(escape: re.Match[str]) -> str:
    digits = escape[1] or escape[2]
    if digits is None:
        return escape[0]
    number = int(digits, 16)
    if number < 0x80:
        return f"\\x{number:02x}"
    if number > 0x10FFFF or 0xD800 <= number < 0xE000:
        raise ValueError(f"{escape[0]} is no character")
    return chr(number)


def _outside_strings(text: str) -> str:
    """With alternatives that begin a line put at the end of the line before."""
    parts, end = [], 0
    for token in _TOKEN.finditer(text):
        parts += [_NEXT_ALTERNATIVE.sub(" |", text[end : token.start()]), token[0]]
        end = token.end()
    return "".join([*parts, _NEXT_ALTERNATIVE.sub(" |", text[end:])])
