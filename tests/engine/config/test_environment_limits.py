"""Limits from the environment."""

from __future__ import annotations

import pytest

from engine.config import ConfigError
from engine.config.environment import count_limit


def test_a_count_is_a_whole_number_and_the_twin_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_limit("SOME_LIMIT") is None
    monkeypatch.setenv("SGLANG_SOME_LIMIT", "70")
    assert count_limit("SOME_LIMIT") == 70
    monkeypatch.setenv("TOKENMILL_SOME_LIMIT", "0")
    assert count_limit("SOME_LIMIT") == 0


@pytest.mark.parametrize("word", ["-1", "1.5", "many", "²"])
def test_anything_else_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv("SGLANG_SOME_LIMIT", word)
    with pytest.raises(ConfigError, match="environment variable SGLANG_SOME_LIMIT"):
        count_limit("SOME_LIMIT")
