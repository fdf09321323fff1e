"""Settings from the environment. Each `SGLANG_NAME` (or `SGL_NAME`) that the contract lists has a `TOKENMILL_NAME`
twin that wins."""

from __future__ import annotations

import os


def setting(name: str) -> str | None:
    """Value of TOKENMILL_{name}, else of SGLANG_{name}, SGL_{name}, else None. An empty value counts as unset."""
    values = (os.environ.get(prefix + name) for prefix in ("TOKENMILL_", "SGLANG_", "SGL_"))
    return next((value for value in values if value), None)


def switch(name: str, default: bool = False) -> bool:
    """A yes/no setting."""
    value = setting(name)
    return default if value is None else value.lower() in ("1", "true", "yes", "on", "y", "t")


def number(name: str, default: float) -> float:
    """A numeric setting. Raises ValueError naming it when it is not a number."""
    value = setting(name)
    try:
        return default if value is None else float(value)
    except ValueError:
        raise ValueError(f"environment variable {name}: {value!r} is not a number") from None


def time_limit(name: str) -> float | None:
    """A limit in seconds; unset or negative means none."""
    seconds = number(name, -1.0)
    return None if seconds < 0 else seconds
