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
from pathlib import Path
from typing import Any

import zmq

from engine.config import RunConfig
from engine.config.environment import switch
from engine.launcher.children import Child, Program
from engine.launcher.deaths import go_on_giving_up, replace, report_deaths, start_what_is_due
from engine.launcher.notify import Notifier
from engine.launcher.restarts import Restarts
from engine.launcher.signals import arrived
from engine.launcher.tree import Tree, is_whole, pass_on, serving, start, write
from engine.launcher.watchdog import Watchdog
from engine.wire.board import Board
from engine.wire.lifecycle import Drain, Limits, Ready, Serving, ToLauncher, Warm
from engine.wire.sockets import Inbox, Outbox

log = logging.getLogger(__name__)

DRAIN_MARGIN = 5.0
"""Seconds beyond --drain-timeout after which the frontend is ended though it has not finished."""
END_GRACE = 3.0
"""Seconds between SIGTERM and SIGKILL."""


def supervise(
    run: RunConfig, config_file: Path, programs: Sequence[Program], listener: socket.socket,
    signals: socket.socket, context: zmq.Context[Any], *, url: str, began: float,
    notifier: Notifier, socket_passed: bool,
) -> int:  # fmt: skip
    """Start `programs` and see them through; returns the exit code, when none of them is left.

    0: a signal has ended the server. 1: a process died before the server was ready, or too many did since.
    Raises ConfigError for a bad setting of the environment.
    """
    board, server = Board(run.runtime_dir), run.server
    tree = Tree(
        run, config_file, listener, url, began, signals, Inbox(context, run.runtime_dir, "launcher", ToLauncher),
        Outbox(context, run.runtime_dir, "frontend"), board,
        Watchdog(board, server.watchdog_timeout, server.soft_watchdog_timeout),
        Restarts(server.max_restarts, server.restart_window), END_GRACE, force_shutdown=switch("FORCE_SHUTDOWN"),
        notifier=notifier, socket_passed=socket_passed,
    )  # fmt: skip
    if not tree.serves:
        tree.warm = True  # there is no frontend to say so, and who waits for machine 0 is not ill
    tree.selector.register(signals, selectors.EVENT_READ)
    tree.selector.register(tree.inbox.fileno(), selectors.EVENT_READ)
    try:
        for program in programs:
            start(tree, program)
        code = _look(tree)
        while code is None:
            _wait(tree, tree.notifier.beat(_next_look(tree)))
            code = _look(tree)
        return code
    finally:
        _end(tree)
        tree.frontend.close(linger_ms=0)
        tree.inbox.close()
        tree.selector.close()
        board.close()


def _next_look(tree: Tree) -> float:
    """When (time.monotonic()) there may be something to do though nothing has arrived."""
    until = time.monotonic() + tree.watchdog.interval
    return min([until, *tree.due.values(), *filter(None, (tree.drain_until, tree.giving_up_until))])


def _wait(tree: Tree, until: float | None) -> None:
    """Wait for something to look at, at most until `until` (of time.monotonic()), and pass on what children write."""
    for key, _ in tree.selector.select(None if until is None else max(0.0, until - time.monotonic())):
        if isinstance(key.data, Child):
            pass_on(tree, key.data)


def _look(tree: Tree) -> int | None:
    """Deal with all that has happened; returns the exit code once the server is to end."""
    stops = [number for number in arrived(tree.signals) if number != signal.SIGCHLD]
    for message in tree.inbox.drain():
        _hear(tree, message)
    for number in stops:
        if _stop(tree, number):
            return 0
    _kill_hung(tree)
    ended = [child for child in tree.children if child.process.poll() is not None]
    if tree.giving_up_until is not None:
        return go_on_giving_up(tree, ended)
    if ended and not tree.warm:
        return report_deaths(tree, ended)
    if tree.drain_until is not None and any(child.program.listens for child in ended):
        return 0 if _is_drained(ended) else report_deaths(tree, ended)
    for child in ended:
        if child in tree.children:  # it may have gone with another of its group
            replace(tree, child)
    start_what_is_due(tree)
    _tell_load(tree)
    if tree.drain_until is not None and time.monotonic() >= tree.drain_until:
        log.warning("the frontend has not finished in time; requests in flight are cut off")
        return 0
    return None


def _hear(tree: Tree, message: ToLauncher) -> None:
    match message:
        case Ready(process, pid, limits):
            child = next((child for child in tree.children if child.process.pid == pid), None)
            if child is None:
                return  # it has died since
            log.info("%s (pid %d) is ready after %.2f s", process, pid, time.monotonic() - child.started)
            tree.ready[process] = message
            tree.watchdog.note_loaded(child)
            tree.limits = limits or tree.limits
            if not tree.serves and is_whole(tree):
                _say_joined(tree)
            if tree.limits is not None and is_whole(tree):
                tree.frontend.send(Serving(tree.run.epoch, tree.limits))
                if tree.warm:
                    tree.notifier.status(serving(tree))
                _log_limits(tree.run, tree.limits)
        case Warm() if tree.warm:
            log.info("the frontend serves again")
        case Warm():
            tree.warm = True
            log.info("The server is fired up and ready to roll!")
            log.info("warm %.2f s after the launcher began", time.monotonic() - tree.began)
            pids = {"launcher": os.getpid()} | {child.program.title: child.process.pid for child in tree.children}
            lines = [f"Tokenmill serves {tree.run.server.served_model_name} on {tree.url}"]
            lines += [f"  {title}: pid {pid}" for title, pid in pids.items()]
            write(sys.stdout, "".join(f"{line}\n" for line in lines).encode())
            tree.notifier.ready(serving(tree))


def _say_joined(tree: Tree) -> None:
    server = tree.run.server
    ranks = ", ".join(child.program.title for child in tree.children)
    words = f"machine {server.node_rank} of {server.nnodes} computes {ranks} for {server.dist_init_addr}"
    write(sys.stdout, f"Tokenmill: {words}\n".encode())
    tree.notifier.ready(words)


def _tell_load(tree: Tree) -> None:
    """The status line tells how many requests there are, unless there is something else to tell."""
    if tree.warm and tree.drain_until is None and tree.giving_up_until is None and is_whole(tree):
        tree.notifier.load(serving(tree))


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
    if not tree.warm or not tree.serves or tree.force_shutdown:
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
    """Whether the frontend, which has ended, has done so after its drain."""
    return all(child.process.returncode == 0 for child in ended if child.program.listens)


def _kill_hung(tree: Tree) -> None:
    """Kill who shows no sign of life; its death is then dealt with as any other."""
    running = [child for child in tree.children if not child.hung and child.process.poll() is None]
    # The first request may take as long as loading does: what it needs is made for it.
    for child in tree.watchdog.hung(running, tree.ready if tree.warm else ()):
        child.kill_hung()


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
        pass_on(tree, child)
        assert child.process.stdout is not None
        child.process.stdout.close()
