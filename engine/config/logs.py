"""Logging of every process: one line a record on stderr, which the launcher passes on.

A record of one request carries its id (`extra=about(rid)`), so that the lines of all processes about it can be found.
What clients choose (ids, paths) is in some records: a line break in it begins no line, and no character of it moves the
cursor of a terminal. What they wrote is in none: where a process handles texts, a traceback goes without the messages
of its exceptions, which may quote them.
"""

from __future__ import annotations

import json
import logging
import logging.config
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import msgspec

from engine.config.environment import setting
from engine.config.server import ConfigError


def set_up_logging(level: str, process: str, form: str = "text", *, messages: bool = True) -> None:
    """Send records of `level` and above to stderr, each with its time and the process's name.

    form: "text" or "json". messages: tracebacks show those of exceptions. SGLANG_LOGGING_CONFIG_PATH names a file for
    `logging.config.dictConfig` that is obeyed afterwards. Raises ConfigError when it cannot be.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(process, form, messages=messages))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    path = setting("LOGGING_CONFIG_PATH")
    if path is not None:
        _obey(path)


def formatter(process: str, form: str, *, messages: bool = True) -> logging.Formatter:
    """What makes a line of a record. form: "text" or "json"."""
    if form == "json":
        return JsonFormatter(process, messages=messages)
    return TextFormatter(process, messages=messages)


def printable(line: str) -> str:
    """`line` with its control characters, line breaks and the like written as escapes, as JSON has them."""
    if line.isprintable():
        return line
    return "".join(one if one.isprintable() else json.dumps(one)[1:-1] for one in line)


def set_level(level: str) -> None:
    """Change the level of all loggers that have none of their own."""
    logging.getLogger().setLevel(level.upper())


def about(rid: str) -> dict[str, str]:
    """The `extra` of a record about the request `rid`."""
    return {"rid": rid}


class TextFormatter(logging.Formatter):
    """A record as one line, behind it the lines of its traceback, which are indented: none of them looks like a record.

    messages: tracebacks show those of exceptions.
    """

    def __init__(self, process: str, *, messages: bool = True) -> None:
        super().__init__(f"[%(asctime)s {process}] %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
        self._messages = messages

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's own name)
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        text = super().formatException(ei) if self._messages else _frames(ei[1])
        return "\n".join("  " + printable(line) for line in text.split("\n"))


class JsonFormatter(logging.Formatter):
    """A record as one JSON object on one line: time, level, process, pid, logger, message, and rid and exception where
    there are any."""

    def __init__(self, process: str, *, messages: bool = True) -> None:
        super().__init__()
        self._process = process
        self._messages = messages
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
            error = record.exc_info[1]
            entry["exception"] = self.formatException(record.exc_info) if self._messages else _frames(error)
        return printable(msgspec.json.encode(entry).decode())


def _frames(error: BaseException | None) -> str:
    """A traceback without the messages of its exceptions."""
    told: list[str] = []
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        name = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
        frames = "".join(traceback.format_tb(error.__traceback__))
        told.append(f"Traceback (most recent call last):\n{frames}{name}: (its message may quote a request)")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n\nwhich came of:\n\n".join(told)


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
