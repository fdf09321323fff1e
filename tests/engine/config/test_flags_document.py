from __future__ import annotations

from pathlib import Path

from scripts.flags_table import flags_document

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "flags.md"


def test_the_document_says_what_the_parser_knows() -> None:
    assert DOCUMENT.read_text() == flags_document(), "run: python -m scripts.flags_table > docs/flags.md"
