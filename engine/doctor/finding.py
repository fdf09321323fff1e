"""What a check has found."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec


class Finding(msgspec.Struct, frozen=True):
    """check: what was looked at. advice: what to change; empty where all is well.

    ok: nothing to do. warning: it serves, but worse than it could, or only for now. error: it will not serve.
    """

    check: str
    level: Literal["ok", "warning", "error"]
    message: str
    advice: str = ""

    def line(self) -> str:
        advice = f": {self.advice}" if self.advice else ""
        return f"{self.level:<7}  {self.check:<16}  {self.message}{advice}"


def read_text(path: str) -> str | None:
    """A file of /proc or /sys; None where there is none, as on other systems."""
    try:
        return Path(path).read_text()
    except OSError:
        return None
