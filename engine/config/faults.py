"""Faults for tests: the environment variable TOKENMILL_FAULTS has requests fail at given places. Unset (or empty) it is
inactive, and costs nothing but a look at `faults.armed`.

A JSON list of objects, read once when a process starts; each process counts for itself, and anew when it is restarted:

    {"where": "forward", "token": 417, "what": "raise", "times": 1}
    {"where": "loop", "process": "scheduler", "file": "/tmp/now", "what": "raise"}

where: "admit" (scheduler, arriving), "allocate" (scheduler, before a step that it is in is computed), "forward" (after
the step's KV has been written), "sample", "emit" (scheduler, its row), "tokenize" (tokenizer, the ids of its prompt),
"detokenize" (detokenizer, any of its ids that come by there: the end of the prompt, and the output).
token: a request that has this id in its prompt or its output, as far as both are known there, springs the fault.
where "loop": in the loop of `process` ("tokenizer", "scheduler", "detokenizer", "frontend"), outside of what is done
for any request. It springs at a turn of the loop that finds `file`, and takes that away: one file is one fault.
what: "raise" an exception, a MemoryError ("memory"), die of a signal ("segv"), "exit" with code 70, or "hang".
times: how often at most; null or left out: always.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Container
from pathlib import Path
from typing import Literal

import msgspec

from engine.config.server import ConfigError

VARIABLE = "TOKENMILL_FAULTS"
EXIT_CODE = 70
Where = Literal["forward", "admit", "sample", "emit", "tokenize", "detokenize", "allocate", "loop"]
Process = Literal["tokenizer", "scheduler", "detokenizer", "frontend"]


class InjectedFaultError(RuntimeError):
    """What a fault of kind "raise" raises."""


class Fault(msgspec.Struct, forbid_unknown_fields=True):
    where: Where
    what: Literal["raise", "memory", "segv", "exit", "hang"]
    token: int | None = None
    times: int | None = None
    process: Process | None = None
    file: str | None = None


armed: list[Fault] = []
"""The faults that this process may still spring; see `arm`."""


def arm(text: str | None) -> None:
    """Arm the faults that `text` lists, and no others. Raises ConfigError for a text that is malformed."""
    try:
        found = msgspec.json.decode(text, type=list[Fault]) if text else []
    except msgspec.DecodeError as error:
        raise ConfigError(f"environment variable {VARIABLE}: {error}") from None
    for fault in found:
        if (wrong := _what_is_wrong(fault)) is not None:
            raise ConfigError(f"environment variable {VARIABLE}: {wrong}")
    armed[:] = found


def _what_is_wrong(fault: Fault) -> str | None:
    if fault.times is not None and fault.times < 1:
        return f"times is {fault.times}, must be at least 1 or null"
    needed = ["process", "file"] if fault.where == "loop" else ["token"]
    given = [name for name in ("token", "process", "file") if getattr(fault, name) is not None]
    if given != needed:
        return f"where {fault.where!r} goes with {' and '.join(needed)}, got {' and '.join(given) or 'neither'}"
    return None


def arm_from_environment() -> None:
    """Raises ConfigError."""
    arm(os.environ.get(VARIABLE))


def spring(where: Where, tokens: Container[int]) -> None:
    """Spring the first fault that is armed for `where` and a token of `tokens`, if one is."""
    for fault in armed:
        if fault.where == where and fault.token in tokens:
            _spring(fault, f"injected at {fault.where} by token {fault.token}")
            return


def spring_in_loop(process: Process) -> None:
    """Spring the first fault that is armed for the loop of `process` and whose file is there, if one is."""
    for fault in armed:
        if fault.process == process and fault.file is not None and _take_away(fault.file):
            _spring(fault, f"injected into the loop of the {process} by {fault.file}")
            return


def _take_away(file: str) -> bool:
    try:
        Path(file).unlink()
    except FileNotFoundError:
        return False
    return True


def _spring(fault: Fault, words: str) -> None:
    if fault.times is not None:
        fault.times -= 1
        if not fault.times:
            armed.remove(fault)
    match fault.what:
        case "raise":
            raise InjectedFaultError(words)
        case "memory":
            raise MemoryError(words)
        case "segv":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGSEGV})
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            os._exit(EXIT_CODE)
        case "hang":
            while True:
                time.sleep(3600)
