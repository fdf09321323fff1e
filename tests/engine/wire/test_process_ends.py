"""How a process of the tree ends when something in it breaks: at once, whatever else still goes on in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
BEGIN = """
import sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from engine.config.logs import set_up_logging
from engine.wire.process import play

class Panic(BaseException): ...

def work(): time.sleep(600)

def broken(): raise ValueError("of the thread")

set_up_logging("info", "tested", "json")
"""


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        ("ThreadPoolExecutor(1).submit(work); raise ValueError('of the loop')", "ValueError"),
        ("raise Panic('of Rust')", "Panic"),
        ("threading.Thread(target=broken).start(); work()", "ValueError"),
    ],
    ids=["a loop beside a busy thread", "a panic", "a thread beside a living loop"],
)
def test_an_exception_ends_the_process_at_once(lines: str, name: str) -> None:
    ended = play(lines)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1 and '"level":"critical"' in ended.stderr, ended.stderr
    assert "Traceback" in ended.stderr and f'"message":"{name}: nobody caught it' in ended.stderr, ended.stderr


def test_an_exit_that_is_meant_keeps_its_words() -> None:
    ended = play("sys.exit('error: the model is gone')")
    assert (ended.returncode, ended.stderr) == (1, "error: the model is gone\n")


def play(lines: str) -> subprocess.CompletedProcess[str]:
    program = f"{BEGIN}\ndef main():\n    {lines}\n\nplay(main)\n"
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=False)
