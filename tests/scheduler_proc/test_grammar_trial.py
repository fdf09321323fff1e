"""Grammars that take more than they may: the process that tries them is given up, and whoever asked is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from grammar_cases import PATIENCE, compiled, small_engine

from engine.wire.sampling import Grammar
from scheduler_proc.constraint import GrammarError
from scheduler_proc.grammar_text import JsonSpaces
from scheduler_proc.grammar_trial import Question, TrialProcess

ENDLESS = json.dumps({"allOf": [{"type": "string", "pattern": f"a{{{i}}}b*"} for i in range(200)]})
"""The intersection of 200 patterns: nobody has waited for it."""


def question(text: str) -> Question:
    return Question(Grammar("json", text), JsonSpaces(), [])


def test_one_process_answers_many_questions() -> None:
    process = TrialProcess()
    for text, error in (("{}", False), ("INVALID", True), ('{"enum":["' + "x" * 500_000 + '"]}', False)):
        verdict = process.ask(question(text), time.monotonic() + PATIENCE)
        assert (verdict.error is not None) is error and bool(verdict.text) is not error
    assert process.alive
    assert process.end() == -signal.SIGKILL and not process.alive


def test_a_grammar_that_takes_too_long_ends_its_process() -> None:
    process = TrialProcess()
    assert process.ask(question("{}"), time.monotonic() + PATIENCE).error is None
    with pytest.raises(TimeoutError):
        process.ask(question(ENDLESS), time.monotonic() + 0.3)
    assert not process.alive


def test_an_engine_goes_on_behind_one_that_takes_too_long() -> None:
    engine = small_engine()
    assert compiled(engine, "regex", "a").width
    with pytest.raises(TimeoutError):
        engine.compile(Grammar("json", ENDLESS), time.monotonic() + 0.3)
    assert engine.idle.empty()
    assert compiled(engine, "regex", "a").width
    assert engine.idle.qsize() == 1


def test_a_process_that_ends_is_replaced() -> None:
    engine = small_engine()
    compiled(engine, "regex", "a")
    process = engine.idle.get()
    os.kill(process._process.pid, signal.SIGKILL)
    process._process.wait()
    engine.idle.put(process)
    assert compiled(engine, "json", "{}").width
    assert engine.idle.qsize() == 1


def test_a_grammar_that_ends_its_process_is_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(GrammarError, match=r"Failed to compile json grammar: it is too complex: .* status"):
        compiled(small_engine(), "json", "{}")


def test_the_process_ends_with_its_stdin() -> None:
    ended = subprocess.run([sys.executable, "-P", "-m", "scheduler_proc.grammar_trial"], input=b"", check=False)
    assert ended.returncode == 0
