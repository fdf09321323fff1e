"""Log lines as text and as JSON, and a logging configuration of the operator's own."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config.logs import JsonFormatter, about, formatter, timestamp

REPOSITORY = Path(__file__).resolve().parents[3]
QUOTED = "xylophone"


def test_a_record_is_one_json_object() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.getLogger("x.y").makeRecord(
            "x.y", logging.ERROR, "f", 1, 'it %s\n"broke"', ("really",), sys.exc_info(), extra=about("r-1")
        )
    line = JsonFormatter("scheduler tp0").format(record)
    assert "\n" not in line
    entry = json.loads(line)
    assert entry.pop("time").endswith("Z") and entry.pop("pid") > 0
    assert "ValueError: two\nlines" in entry.pop("exception")
    assert entry == {
        "level": "error", "process": "scheduler tp0", "logger": "x.y", "message": 'it really\n"broke"', "rid": "r-1"
    }  # fmt: skip
    assert timestamp(0.1239) == "1970-01-01T00:00:00.123Z"


def run(code: str, config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"SGLANG_LOGGING_CONFIG_PATH": str(config)}, cwd=REPOSITORY,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_the_operators_own_configuration_is_obeyed(tmp_path: Path) -> None:
    code = (
        "import logging; from engine.config.logs import set_up_logging; set_up_logging('info', 'p', 'text'); "
        "logging.getLogger('quiet').info('no'); logging.getLogger('loud').info('yes')"
    )
    config = tmp_path / "logging.json"
    config.write_text(json.dumps({"version": 1, "incremental": True, "loggers": {"quiet": {"level": "ERROR"}}}))
    done = run(code, config)
    assert done.returncode == 0 and " p] INFO yes" in done.stderr and "no" not in done.stderr, done.stderr
    config.write_text("{")
    done = run(code, config)
    assert "ConfigError: environment variable SGLANG_LOGGING_CONFIG_PATH" in done.stderr


def quoting_record() -> logging.LogRecord:
    """Of an error whose message, like that of its cause, quotes a prompt, about a request of an odd name."""
    try:
        try:
            raise KeyError(f"{QUOTED}\n[2026-01-01 00:00:00 frontend] INFO forged")
        except KeyError as cause:
            raise ValueError(f"{QUOTED} \x1b[2J") from cause
    except ValueError:
        return logging.getLogger("x").makeRecord(
            "x", logging.ERROR, "f", 1, "request %s failed", ("r\n[2026\x1b[31m\x9b\u202e",), sys.exc_info()
        )  # fmt: skip


@pytest.mark.parametrize("messages", [True, False])
def test_no_client_forges_a_line(messages: bool) -> None:
    text = formatter("frontend", "text", messages=messages).format(quoting_record())
    first, *rest = text.split("\n")
    assert first.endswith("ERROR request r\\n[2026\\u001b[31m\\u009b\\u202e failed")
    assert rest and all(line.startswith("  ") and line.isprintable() for line in rest)
    line = formatter("frontend", "json", messages=messages).format(quoting_record())
    assert line.isprintable()
    entry = json.loads(line)
    assert entry["message"] == "request r\n[2026\x1b[31m\x9b\u202e failed"
    for told in (text, entry["exception"]):
        assert (QUOTED in told) is messages
        assert "ValueError: " in told and "KeyError: " in told and "in quoting_record" in told
