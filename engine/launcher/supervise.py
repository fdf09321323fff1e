"""The launcher's loop: it waits for the processes, messages and signals of one launch, all at once."""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import zmq

from engine.config import RunConfig
from engine.config.environment import switch
from engine.launcher.children import Child, Program, start_child
from engine.launcher.notify import Notifier
from engine.launcher.signals import arrived
from engine.wire.lifecycle import Drain, FromLauncher, Limits, Ready, Serving, ToLauncher, Warm
from engine.wire.sockets import Inbox, Outbox

log = logging.getLogger(__name__)

DRAIN_MARGIN = 5.0
"""Seconds beyond --drain-timeout after which the frontend is ended though it has not finished."""
END_GRACE = 3.0
"""Seconds between SIGTERM and SIGKILL."""


@dataclass
class Tree:
    """One launch under way.

    url: where it serves. began: time.monotonic() at its start. force_shutdown: a signal ends it without a drain.
    socket_passed: the listening socket is the service manager's, and outlives this server.
    """

    run: RunConfig
    url: str
    began: float
    signals: socket.socket
    inbox: Inbox[ToLauncher]
    frontend: Outbox[FromLauncher]
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    children: list[Child] = field(default_factory=list)
    ready: dict[str, Ready] = field(default_factory=dict)
    force_shutdown: bool = False
    warm: bool = False
    drain_until: float | None = None
    grace: float = END_GRACE
    notifier: Notifier = field(default_factory=Notifier)
    socket_passed: bool = False


def supervise(
    run: RunConfig, config_file: Path, programs: Sequence[Program], listener: socket.socket,
    signals: socket.socket, context: zmq.Context[Any], *, url: str, began: float,
    notifier: Notifier, socket_passed: bool,
) -> int:  # fmt: skip
    """Start `programs` and see them through; returns the exit code, when none of them is left.

    0: a signal has ended the server. 1: a process died. Raises ConfigError for a bad setting of the environment.
    """
    tree = Tree(
        run, url, began, signals, Inbox(context, run.runtime_dir, "launcher", ToLauncher),
        Outbox(context, run.runtime_dir, "frontend"), force_shutdown=switch("FORCE_SHUTDOWN"),
        notifier=notifier, socket_passed=socket_passed,
    )  # fmt: skip
    tree.selector.register(signals, selectors.EVENT_READ)
    tree.selector.register(tree.inbox.fileno(), selectors.EVENT_READ)
    try:
        for program in programs:
            child = start_child(program, config_file, listener)
            tree.children.append(child)
            tree.selector.register(child.output, selectors.EVENT_READ, child)
        code = _look(tree)
        while code is None:
            _wait(tree, tree.notifier.beat(tree.drain_until))
            code = _look(tree)
        return code
    finally:
        _end(tree)
        tree.frontend.close(linger_ms=0)
        tree.inbox.close()
        tree.selector.close()


def _wait(tree: Tree, until: float | None) -> None:
    """Wait for something to look at, at most until `until` (of time.monotonic()), and pass on what children write."""
    for key, _ in tree.selector.select(None if until is None else max(0.0, until - time.monotonic())):
        if isinstance(key.data, Child):
            _pass_on(tree, key.data)


def _look(tree: Tree) -> int | None:
    """Deal with all that has happened; returns the exit code once the server is to end."""
    stops = [number for number in arrived(tree.signals) if number != signal.SIGCHLD]
    for message in tree.inbox.drain():
        _hear(tree, message)
    for number in stops:
        if _stop(tree, number):
            return 0
    ended = [child for child in tree.children if child.process.poll() is not None]
    if ended:
        drained = tree.drain_until is not None and _is_drained(ended)
        return 0 if drained else _report_deaths(tree, ended)
    if tree.drain_until is not None and time.monotonic() >= tree.drain_until:
        log.warning("the frontend has not finished in time; requests in flight are cut off")
        return 0
    return None


def _hear(tree: Tree, message: ToLauncher) -> None:
    match message:
        case Ready(process, pid):
            log.info("%s (pid %d) is ready after %.2f s", process, pid, time.monotonic() - tree.began)
            tree.ready[process] = message
            limits = next((ready.limits for ready in tree.ready.values() if ready.limits is not None), None)
            if limits is not None and all(child.program.name in tree.ready for child in tree.children):
                tree.frontend.send(Serving(tree.run.epoch, limits))
                _log_limits(tree.run, limits)
        case Warm():
            tree.warm = True
            log.info("The server is fired up and ready to roll!")
            log.info("warm %.2f s after the launcher began", time.monotonic() - tree.began)
            pids = {"launcher": os.getpid()} | {child.program.title: child.process.pid for child in tree.children}
            lines = [f"Tokenmill serves {tree.run.server.served_model_name} on {tree.url}"]
            lines += [f"  {title}: pid {pid}" for title, pid in pids.items()]
            _write(sys.stdout, "".join(f"{line}\n" for line in lines).encode())
            tree.notifier.ready(f"serving {tree.run.server.served_model_name} on {tree.url}")


def _log_limits(run: RunConfig, limits: Limits) -> None:
    log.info(
        "max_total_num_tokens=%d, chunked_prefill_size=%d, max_prefill_tokens=%d, max_running_requests=%d, "
        "context_len=%d",
        limits.max_total_num_tokens, limits.chunked_prefill_size, run.server.max_prefill_tokens,
        limits.max_running_requests, run.facts.context_length,
    )  # fmt: skip


def _stop(tree: Tree, number: signal.Signals) -> bool:
    """Act on a stop signal: the first one begins the drain. Returns whether the server is to end now."""
    if tree.drain_until is not None:
        log.warning("%s again: ending at once", number.name)
        tree.grace = 0.0
        return True
    if not tree.warm or tree.force_shutdown:
        log.info("%s: ending", number.name)
        tree.notifier.stopping(f"{number.name}: ending", tree.grace)
        return True
    timeout = tree.run.server.drain_timeout
    log.info("%s: requests in flight have %.0f s to finish; once more to end at once", number.name, timeout)
    tree.frontend.send(Drain(timeout, leave_queue=tree.socket_passed))
    tree.drain_until = time.monotonic() + timeout + DRAIN_MARGIN
    tree.notifier.stopping(f"{number.name}: requests in flight finish", timeout + DRAIN_MARGIN + tree.grace)
    return False


def _is_drained(ended: list[Child]) -> bool:
    """Whether what has ended is the frontend alone, as it should after its drain."""
    return all(child.program.listens and child.process.returncode == 0 for child in ended)


def _report_deaths(tree: Tree, ended: list[Child]) -> int:
    for child in ended:
        _pass_on(tree, child)
    for child in ended:
        last = "".join(f"    {line}\n" for line in child.tail)
        _write(sys.stderr, f"error: {child.describe_end()}; the server ends. Its last lines:\n{last}".encode())
    return 1


def _end(tree: Tree) -> None:
    """End every child that is left: SIGTERM, and SIGKILL to those that are still there after the grace time."""
    deadline = time.monotonic() + tree.grace
    for child in tree.children if tree.grace else ():
        if child.process.poll() is None:
            child.process.terminate()
    while any(child.process.poll() is None for child in tree.children) and time.monotonic() < deadline:
        _wait(tree, deadline)
        if any(number != signal.SIGCHLD for number in arrived(tree.signals)):
            break
    for child in tree.children:
        if child.process.poll() is None:
            if tree.grace:
                log.warning("%s (pid %d) does not end: killing it", child.program.title, child.process.pid)
            child.process.kill()
        child.process.wait()
        _pass_on(tree, child)
        assert child.process.stdout is not None
        child.process.stdout.close()


def _pass_on(tree: Tree, child: Child) -> None:
    lines, ended = child.read()
    _write(sys.stderr, lines)
    if ended and child.output in tree.selector.get_map():
        tree.selector.unregister(child.output)


def _write(stream: TextIO | None, lines: bytes) -> None:
    """Write to stdout or stderr. That it was closed, or cannot be written any more (a terminal that went away is EIO, a
    full disk ENOSPC), is no reason to stop serving."""
    if lines and stream is not None:
        try:
            stream.buffer.write(lines)
            stream.flush()
        except OSError as error:
            log.debug("%s cannot be written: %s", stream.name, error)
