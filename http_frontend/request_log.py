"""The request log: a line when a request comes and one when it ends (contract §1.2, §4.7)."""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import dataclass, field
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import msgspec

from engine.config import ConfigError, ServerConfig
from engine.config.environment import number
from engine.config.logs import about, formatter, printable, timestamp
from engine.config.run import Standing
from engine.wire.to_tokenizer import Embed, Generate, Judge
from http_frontend.journal import Entry, Request

_FILE_BYTES = 64 << 20
_FILES = 16
"""A folder of request logs holds at most so many files of so many bytes; the oldest goes first."""
_PART = 2048
"""Characters, or ids, of a text that level 2 shows."""


@dataclass(slots=True)
class RequestLog:
    """level: 0: numbers alone, 1: and sampling parameters, 2: and the beginning of texts, 3: everything.

    slower_than: seconds; only requests that took longer are logged, at their end. 0.0: all.
    """

    on: bool
    level: int
    form: str
    slower_than: float
    logger: logging.Logger = field(default_factory=lambda: logging.getLogger("tokenmill.requests"))

    def received(self, entry: Entry) -> None:
        if self.on and not self.slower_than and _is_logged(entry):
            self._write("Receive", "request.received", entry.message.rid, {"obj": asked(entry.message, self.level)})

    def ended(self, entry: Entry) -> None:
        if not self.on or not _is_logged(entry) or entry.finished - entry.arrived < self.slower_than:
            return
        facts = {"obj": asked(entry.message, self.level), "out": answered(entry, self.level)}
        self._write("Finish", "request.finished", entry.message.rid, facts)

    def _write(self, word: str, event: str, rid: str, facts: dict[str, dict[str, Any]]) -> None:
        if self.form == "json":
            line = {"timestamp": timestamp(time.time()), "event": event, "rid": rid, **facts}
            self.logger.info("%s", msgspec.json.encode(line).decode(), extra={"whole_line": True, **about(rid)})
            return
        parts = [f"{name}={_shown(values)}" for name, values in facts.items()]
        self.logger.info("%s: rid=%s, %s", word, rid, ", ".join(parts), extra=about(rid))


def open_request_log(server: ServerConfig, standing: Standing) -> RequestLog:
    """The log as the launch wants it, or an operator since.

    Raises ConfigError for a folder that cannot be written to.
    """
    level = standing.log_requests_level
    log = RequestLog(
        on=server.log_requests if standing.log_requests is None else standing.log_requests,
        level=server.log_requests_level if level is None else level,
        form=standing.log_requests_format or server.log_requests_format,
        slower_than=max(0.0, number("LOG_REQUEST_EXCEEDED_MS", -1.0) / 1000),
    )
    log.logger.propagate = False
    log.logger.setLevel(logging.INFO)
    log.logger.handlers.clear()
    for target in server.log_requests_target or ["stdout"]:
        handler = logging.StreamHandler(sys.stdout) if target == "stdout" else _in_folder(Path(target))
        handler.setFormatter(_Lines(formatter("frontend", server.log_format)))
        log.logger.addHandler(handler)
    return log


def asked(message: Request, level: int) -> dict[str, Any]:
    """What a request asks for, as far as `level` shows it."""
    facts: dict[str, Any] = {"kind": type(message).__name__.lower()}
    if level >= 1 and isinstance(message, Generate):
        facts["sampling_params"] = msgspec.structs.asdict(message.sampling)
        facts["text_options"] = msgspec.structs.asdict(message.text_options)
        facts["logprobs"] = None if message.logprobs is None else msgspec.structs.asdict(message.logprobs)
        facts["priority"] = message.priority
    if level >= 2:
        match message:
            case Generate() | Embed():
                facts["text"] = _part(message.text, level)
                facts["input_ids"] = _ids(message.input_ids, level)
            case Judge():
                facts["query"] = _part(message.query, level)
                facts["document"] = _part(message.document, level)
    return facts


def answered(entry: Entry, level: int) -> dict[str, Any]:
    """How an entry ended; one without a finish was left by its client."""
    facts: dict[str, Any] = {
        "prompt_tokens": entry.prompt_tokens,
        "completion_tokens": len(entry.output_ids),
        "cached_tokens": entry.cached_tokens,
        "finish_reason": "disconnect" if entry.finish is None else msgspec.structs.asdict(entry.finish),
        "e2e_latency": round(entry.finished - entry.arrived, 6),
    }
    if entry.first_at:
        facts["first_token_latency"] = round(entry.first_at - entry.arrived, 6)
    if level < 3 and entry.finish is not None and isinstance(entry.finish.matched, str):
        facts["finish_reason"]["matched"] = "..." if level < 1 else entry.finish.matched
    if level >= 2:
        facts["text"] = _part("".join(entry.texts), level)
        facts["output_ids"] = entry.output_ids if level >= 3 else entry.output_ids[:_PART]
    return facts


class _Lines(logging.Formatter):
    """Leaves a record that is a whole line of JSON already as it is."""

    def __init__(self, other: logging.Formatter) -> None:
        super().__init__()
        self._other = other

    def format(self, record: logging.LogRecord) -> str:
        return printable(record.getMessage()) if getattr(record, "whole_line", False) else self._other.format(record)


class _PrivateFile(RotatingFileHandler):
    """Its files are the user's alone: they may hold prompts."""

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        return os.fdopen(descriptor, "a", encoding="utf-8")


def _in_folder(folder: Path) -> logging.Handler:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _PrivateFile(folder / f"requests-{os.getpid()}.log", maxBytes=_FILE_BYTES, backupCount=_FILES - 1)
    except OSError as error:
        raise ConfigError(f"argument --log-requests-target: {str(folder)!r}: {error.strerror}") from None


def _is_logged(entry: Entry) -> bool:
    """The server's own requests, and those that only prepare others, are not."""
    return not (entry.probe or entry.quiet or entry.followers)


def _part(text: str | None, level: int) -> str | None:
    if text is None or level >= 3 or len(text) <= _PART:
        return text
    return f"{text[:_PART]}... ({len(text)} characters)"


def _ids(packed: bytes | None, level: int) -> list[int] | None:
    if packed is None:
        return None
    return memoryview(packed if level >= 3 else packed[: 4 * _PART]).cast("i").tolist()


def _shown(values: dict[str, Any]) -> str:
    return "(" + ", ".join(f"{name}={value!r}" for name, value in values.items()) + ")"
