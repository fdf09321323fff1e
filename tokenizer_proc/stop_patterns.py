"""Whether a `stop_regex` may be used: it must be valid, and small once its repetitions are written out.

The dialect is that of Python's `re`. The detokenizer searches with the `regex` package, which has time limits, and
which writes `x{1000}` out when it compiles: 15 bytes of `((a{1000}){1000}){1000}` would take all memory.
"""

from __future__ import annotations

import re
import re._parser as re_parser  # type: ignore[import-not-found]  # the only parser of `re`'s dialect there is
import warnings
from typing import Any

import regex

MAX_PATTERN_SIZE = 10_000
"""Most elements of a pattern with its repetitions written out: 5 ms and a few MB to compile."""


def pattern_error(pattern: str) -> str | None:
    """What is wrong with `pattern`, None for nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            size = _size(re_parser.parse(pattern))
            if size > MAX_PATTERN_SIZE:
                return f"its repetitions make {size} elements, at most {MAX_PATTERN_SIZE} are allowed"
            regex.compile(pattern)
    except (re.error, regex.error, OverflowError, RecursionError, ValueError) as error:
        return str(error) or type(error).__name__
    return None


def _size(tree: Any) -> int:
    """Elements of a parsed pattern, each counted as often as it must occur at least."""
    total = 0
    for operator, argument in tree:
        if operator in (re_parser.MAX_REPEAT, re_parser.MIN_REPEAT, re_parser.POSSESSIVE_REPEAT):
            least, _, inner = argument
            total += max(1, least) * _size(inner)
        else:
            total += 1 + sum(_size(inner) for inner in _subpatterns(argument))
    return total


def _subpatterns(argument: Any) -> list[Any]:
    """The patterns inside an element's argument, however deep its tuples and lists hold them."""
    if isinstance(argument, re_parser.SubPattern):
        return [argument]
    if isinstance(argument, (tuple, list)):
        return [inner for part in argument for inner in _subpatterns(part)]
    return []
