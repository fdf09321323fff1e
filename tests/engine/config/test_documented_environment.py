"""What the documentation says of the environment is what the code reads."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("engine", "http_frontend", "tokenizer_proc", "scheduler_proc", "detokenizer_proc")


def test_every_variable_of_the_documentation_is_read() -> None:
    page = (ROOT / "docs/http_api.md").read_text()
    section = page.partition("## Environment")[2].partition("\n## ")[0]
    names = set(re.findall(r"`(?:SGLANG|SGL|TOKENMILL)_([A-Z_]+)", section))
    assert len(names) > 10
    code = "".join(path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    read = set(re.findall(r'\b(?:setting|switch|number|time_limit|count_limit)\(\s*"([A-Z_]+)"', code))
    assert not names - read, f"documented and not read: {sorted(names - read)}"
