"""Grammars tried out in a process of its own: one that takes too long, or too much memory, is given up together with
that process, and nothing else.

`python -m scheduler_proc.grammar_trial` reads questions from its stdin and writes verdicts to its stdout.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import subprocess
import sys
import time
from typing import IO

import msgspec

from engine.wire.sampling import Grammar
from scheduler_proc.grammar_text import JsonSpaces, limits, written

MOST_MEMORY = 2 << 30
"""Bytes of address space of the process."""

_PR_SET_PDEATHSIG = 1
_SIZE = 8
"""Bytes of a message's length, little-endian, before the message."""


class Question(msgspec.Struct, frozen=True, array_like=True):
    """special: texts of special tokens."""

    grammar: Grammar
    spaces: JsonSpaces
    special: list[str]


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """text: the grammar as llguidance reads it. error: what is wrong with it."""

    text: str
    error: str | None = None


class TrialProcess:
    """A process that tries grammars. It ends with the thread that has made it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "scheduler_proc.grammar_trial"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a panic may quote the grammar
        )  # fmt: skip
        self.alive = True

    def ask(self, question: Question, deadline: float) -> Verdict:
        """deadline: by `time.monotonic()`. Raises TimeoutError; the process is gone then."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            _write(self._process.stdin, msgspec.msgpack.encode(question))
            size = int.from_bytes(self._read(_SIZE, deadline), "little")
            return msgspec.msgpack.decode(self._read(size, deadline), type=Verdict)
        except TimeoutError:
            self.end()
            raise
        except (EOFError, BrokenPipeError):
            return Verdict("", f"it is too complex: the compiler ended with status {self.end()}")

    def end(self) -> int:
        """End the process. Returns its status."""
        self.alive = False
        self._process.kill()
        with contextlib.suppress(BrokenPipeError), self._process:
            pass
        return self._process.returncode

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._process.stdout is not None
        descriptor, found = self._process.stdout.fileno(), b""
        while len(found) < size:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise TimeoutError
            piece = os.read(descriptor, size - len(found))
            if not piece:
                raise EOFError
            found += piece
        return found


def verdict_of(question: Question) -> Verdict:
    from llguidance import LLMatcher

    try:
        text = written(question.grammar, question.spaces, question.special)
    except (ValueError, RecursionError) as error:
        return Verdict("", str(error))
    error_found, messages = LLMatcher.validate_grammar_with_warnings(text, None, limits=limits())
    return Verdict(text, messages[0] if error_found else None)


def main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the end of stdin is this process's end
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    soft = MOST_MEMORY if most == resource.RLIM_INFINITY else min(MOST_MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (soft, most))
    while size := sys.stdin.buffer.read(_SIZE):
        question = msgspec.msgpack.decode(sys.stdin.buffer.read(int.from_bytes(size, "little")), type=Question)
        _write(sys.stdout.buffer, msgspec.msgpack.encode(verdict_of(question)))


def _write(file: IO[bytes], message: bytes) -> None:
    file.write(len(message).to_bytes(_SIZE, "little") + message)
    file.flush()


if __name__ == "__main__":
    main()
