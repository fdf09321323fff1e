"""Logging of every process: one line a record on stderr, which the launcher passes on.

A record of one request carries its id (`extra=about(rid)`), so that the lines of all processes about it can be found.
"""

from __future__ import annotations

import json
import logging
import logging.config
import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from engine.config.environment import setting
from engine.config.server import ConfigError


def set_up_logging(level: str, process: str, form: str = "text") -> None:
    """Send records of `level` and above to stderr, each with its time and the process's name.

    form: "text" or "json". SGLANG_LOGGING_CONFIG_PATH names a file for `logging.config.dictConfig` that is obeyed
    afterwards. Raises ConfigError when it cannot be.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(process, form))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    path = setting("LOGGING_CONFIG_PATH")
    if path is not None:
        _obey(path)


def formatter(process: str, form: str) -> logging.Formatter:
    """What makes a line of a record. form: "text" or "json"."""
    if form == "json":
        return JsonFormatter(process)
    return logging.Formatter(f"[%(asctime)s {process}] %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")


def set_level(level: str) -> None:
    """Change the level of all loggers that have none of their own."""
    logging.getLogger().setLevel(level.upper())


def about(rid: str) -> dict[str, str]:
    """The `extra` of a record about the request `rid`."""
    return {"rid": rid}


class JsonFormatter(logging.Formatter):
    """A record as one JSON object on one line: time, level, process, pid, logger, message, and rid and exception where
    there are any."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process
        self._pid = os.getpid()

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": timestamp(record.created),
            "level": record.levelname.lower(),
            "process": self._process,
            "pid": self._pid,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (rid := getattr(record, "rid", None)) is not None:
            entry["rid"] = rid
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry).decode()


def timestamp(seconds: float) -> str:
    """A time as ISO 8601 in UTC, with milliseconds."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"


def _obey(path: str) -> None:
    try:
        logging.config.dictConfig(json.loads(Path(path).read_bytes()))
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(
            f"environment variable SGLANG_LOGGING_CONFIG_PATH: {path!r} cannot be used: {error}"
        ) from None
