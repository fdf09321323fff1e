"""Log lines as text and as JSON, and a logging configuration of the operator's own."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

from engine.config.logs import JsonFormatter, about, timestamp

REPOSITORY = Path(__file__).resolve().parents[3]


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
