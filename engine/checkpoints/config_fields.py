"""Typed access to the keys of a config.json, with errors that name the file, the key, the value and what is allowed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from engine.checkpoints.errors import CheckpointError

_REQUIRED: Any = object()
# Sizes beyond this are mistakes, and would overflow where they are multiplied.
_MAX_SIZE = 1 << 40
MOST_LAYERS = 1 << 14
"""What is kept of each layer must not take all memory."""


@dataclass(frozen=True)
class Fields:
    """The keys of one JSON object.

    where: the file (and path inside it), for messages. defaults: what a missing key means. A key that is there with
    null is None, or `default` where the method takes one.
    """

    where: str
    architecture: str
    raw: dict[str, Any]
    defaults: dict[str, Any]

    def error(self, key: str, expected: str) -> CheckpointError:
        """The error of a key whose value is not `expected`."""
        value = self._value(key)
        if value is None and key not in self.raw:
            return CheckpointError(
                f"{self.where}: {key} is missing (architecture {self.architecture}); it must be {expected}"
            )
        return CheckpointError(f"{self.where}: {key} is {value!r}; it must be {expected}")

    def positive(self, key: str, default: Any = _REQUIRED, most: int = _MAX_SIZE) -> int:
        """An integer from 1 to `most`. `default` stands for null, and for a missing key without a family default."""
        value = self._value(key)
        if value is None and default is not _REQUIRED:
            value = default
        if not _is_int(value) or not 1 <= value <= most:
            limit = "" if most == _MAX_SIZE else f" and at most {most}"
            raise self.error(key, f"an integer of at least 1{limit}")
        return int(value)

    def positive_or_none(self, key: str) -> int | None:
        """An integer of at least 1, or None."""
        return None if self._value(key) is None else self.positive(key)

    def count(self, key: str) -> int:
        """An integer of at least 0."""
        value = self._value(key)
        if not _is_int(value) or not 0 <= value <= _MAX_SIZE:
            raise self.error(key, "an integer of at least 0")
        return int(value)

    def positive_number(self, key: str, default: Any = _REQUIRED) -> float:
        """A finite number greater than 0."""
        value = self.number_or_none(key)
        if value is None and default is not _REQUIRED:
            return float(default)
        if value is None or value <= 0:
            raise self.error(key, "a number greater than 0")
        return value

    def number_or_none(self, key: str) -> float | None:
        """A finite number, or None."""
        value = self._value(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, "a finite number")
        try:
            number = float(value)
        except OverflowError:  # an integer beyond all floats
            number = math.inf
        if not math.isfinite(number):
            raise self.error(key, "a finite number")
        return number

    def flag(self, key: str, default: bool) -> bool:
        """true or false; null counts as `default`."""
        value = self._value(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str) -> str:
        """A string."""
        value = self.text_or_none(key)
        if value is None:
            raise self.error(key, "a string")
        return value

    def text_or_none(self, key: str) -> str | None:
        """A string, or None."""
        value = self._value(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def token_ids(self, key: str) -> list[int]:
        """A token id or a list of them. Negative ids, which some configs write for "none", are left out."""
        value = self._value(key)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if not all(_is_int(token) for token in values):
            raise self.error(key, "a token id, a list of token ids or null")
        return [token for token in values if token >= 0]

    def _value(self, key: str) -> Any:
        return self.raw[key] if key in self.raw else self.defaults.get(key)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
