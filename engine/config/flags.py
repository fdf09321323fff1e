"""How a field of `ServerConfig` looks on the command line, and the values that need a parser of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any


@dataclass(frozen=True)
class Flag:
    """The command-line side of one field.

    help: one line for `--help` and docs/flags.md.
    names: spellings; empty means `--field-name`.
    parse: turns the typed word into the value; None means by the field's type.
    choices: allowed words, when they are few.
    metavar: placeholder in `--help`.
    minimum, maximum: least and greatest allowed number, both themselves allowed.
    """

    help: str
    names: tuple[str, ...] = ()
    parse: Callable[[str], Any] | None = None
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    minimum: int | None = None
    maximum: int | None = None


_DECIMAL = {"k": 10**3, "M": 10**6, "G": 10**9}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def token_count(word: str) -> int:
    """Parse a count of tokens: `4096`, `25.6k` (decimal suffix), `32Ki` (binary suffix, whole numbers only).

    Raises ValueError with the accepted forms.
    """
    try:
        for suffix, factor in _BINARY.items():
            if word.endswith(suffix):
                return int(word.removesuffix(suffix)) * factor
        for suffix, factor in _DECIMAL.items():
            if word.endswith(suffix):
                value = Decimal(word.removesuffix(suffix)) * factor
                if value != int(value):
                    raise ValueError
                return int(value)
        return int(word)
    except (ValueError, ArithmeticError):
        raise ValueError(f"{word!r} is not a token count (4096, 25.6k, 1M, 32Ki, 1Mi)") from None


def json_object(word: str) -> dict[str, Any]:
    """Parse one JSON object. Raises ValueError when it is anything else."""
    try:
        value = json.loads(word)
    except json.JSONDecodeError as error:
        raise ValueError(f"{word!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{word!r} is not a JSON object")
    return value
