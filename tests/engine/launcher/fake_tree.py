"""Runs the launcher over four `fake_process`es: `python fake_tree.py '{"config": {...}, "manners": {...}}'`."""

from __future__ import annotations

import json
import sys
from typing import Any

from engine.config import ServerConfig
from engine.launcher import supervise, watchdog
from engine.launcher.children import Program
from engine.launcher.serve import serve

NAMES = ("scheduler", "tokenizer", "detokenizer", "frontend")


def main() -> int:
    wish: dict[str, Any] = json.loads(sys.argv[1])
    supervise.DRAIN_MARGIN = wish.get("drain_margin", supervise.DRAIN_MARGIN)
    supervise.END_GRACE = wish.get("end_grace", supervise.END_GRACE)
    watchdog.FIRST_LOAD = wish.get("first_load", watchdog.FIRST_LOAD)
    manners = wish.get("manners", {})
    programs = [
        Program(
            name, f"the {name}", "fake_process", ("--play", name, "--manner", manners.get(name, "good")),
            listens=name == "frontend",
        )
        for name in NAMES
    ]  # fmt: skip
    return serve(ServerConfig(**wish["config"]), "as typed", ["a warning"], programs)


if __name__ == "__main__":
    sys.exit(main())
