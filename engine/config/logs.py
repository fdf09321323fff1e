"""Logging of every process: one line a record on stderr, which the launcher passes on."""

from __future__ import annotations

import logging
import sys


def set_up_logging(level: str, process: str) -> None:
    """Send records of `level` and above to stderr, each with its time and the process's name."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"[%(asctime)s {process}] %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
