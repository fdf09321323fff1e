"""Settings from the environment. Each `SGLANG_NAME` (or `SGL_NAME`) that the contract lists has a `TOKENMILL_NAME`
twin that wins."""

from __future__ import annotations

import os

from engine.config.server import ConfigError

_PREFIXES = ("TOKENMILL_", "SGLANG_", "SGL_")


def setting(name: str) -> str | None:
    """Value of TOKENMILL_{name}, else of SGLANG_{name}, SGL_{name}, else None. An empty value counts as unset."""
    values = (os.environ.get(prefix + name) for prefix in _PREFIXES)
    return next((value for value in values if value), None)


def _spelling(name: str) -> str:
    """The variable that `setting(name)` has read."""
    return next(prefix + name for prefix in _PREFIXES if os.environ.get(prefix + name))


def switch(name: str, default: bool = False) -> bool:
    """A switch: 1, true, yes, y, t or on; 0, false, no, n, f or off. Raises ConfigError naming it on any other word."""
    value = setting(name)
    if value is None:
        return default
    if value.lower() in ("1", "true", "yes", "y", "t", "on"):
        return True
    if value.lower() in ("0", "false", "no", "n", "f", "off"):
        return False
    raise ConfigError(f"environment variable {_spelling(name)}: {value!r} is neither true nor false")


def number(name: str, default: float) -> float:
    """A numeric setting. Raises ConfigError naming it when it is not a number."""
    value = setting(name)
    try:
        return default if value is None else float(value)
    except ValueError:
        raise ConfigError(f"environment variable {_spelling(name)}: {value!r} is not a number") from None


def time_limit(name: str) -> float | None:
    """A limit in seconds; unset or negative means none."""
    seconds = number(name, -1.0)
    return None if seconds < 0 else seconds


def count_limit(name: str) -> int | None:
    """A limit that is a whole number, 0 or more; unset means none. Raises ConfigError naming it on anything else."""
    value = setting(name)
    if value is None:
        return None
    if not (value.isascii() and value.isdigit()):
        raise ConfigError(f"environment variable {_spelling(name)}: {value!r} is not a whole number, 0 or more")
    return int(value)
