"""Settings that come from environment variables (contract §9)."""

from __future__ import annotations

import os


def _word(name: str) -> str | None:
    """Value of `TOKENMILL_{name}`, else of `SGLANG_{name}`, else None."""
    return os.environ.get(f"TOKENMILL_{name}", os.environ.get(f"SGLANG_{name}"))


def number(name: str, default: float) -> float:
    """A number. Raises ValueError that names the variable when it is none."""
    word = _word(name)
    if word is None:
        return default
    try:
        return float(word)
    except ValueError:
        raise ValueError(f"SGLANG_{name}={word!r} is not a number") from None


def switch(name: str, default: bool) -> bool:
    """A switch: true, 1, yes, y or on; false, 0, no, n or off. Raises ValueError on any other word."""
    word = _word(name)
    if word is None:
        return default
    if word.lower() in ("true", "1", "yes", "y", "on"):
        return True
    if word.lower() in ("false", "0", "no", "n", "off"):
        return False
    raise ValueError(f"SGLANG_{name}={word!r} is neither true nor false")
