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

import msgspec
import zmq

from engine.config import RunConfig, write_run_config
from engine.config.environment import switch
from engine.launcher.children import Child, Program, start_child
from engine.launcher.notify import Notifier
from engine.launcher.restarts import Restarts
from engine.launcher.signals import arrived
from engine.launcher.watchdog import Watchdog
from engine.wire.board import Board
from engine.wire.lifecycle import Drain, FromLauncher, GiveUp, Limits, Lost, Ready, Serving, ToLauncher, Warm
from engine.wire.sockets import Inbox, Outbox

log = logging.getLogger(__name__)

DRAIN_MARGIN = 5.0
"""Seconds beyond --drain-timeout after which the frontend is ended though it has not finished."""
GIVE_UP_GRACE = 7.0
"""Seconds that the frontend gets to fail what is in flight when processes have died too often."""
END_GRACE = 3.0
"""Seconds between SIGTERM and SIGKILL."""


@dataclass
class Tree:
    """One launch under way.

    url: where it serves. began: time.monotonic() at its start. force_shutdown: a signal ends it without a drain.
    due: dead programs, and when (time.monotonic()) they are started again. limits: of the newest scheduler.
    giving_up_until: processes have died too often, and the frontend has until then to say so to its clients.
    socket_passed: the listening socket is the service manager's, and outlives this server.
    """

    run: RunConfig
    config_file: Path
    listener: socket.socket
    url: str
    began: float
    signals: socket.socket
    inbox: Inbox[ToLauncher]
    frontend: Outbox[FromLauncher]
    board: Board
    watchdog: Watchdog
    restarts: Restarts
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    children: list[Child] = field(default_factory=list)
    due: dict[Program, float] = field(default_factory=dict)
    ready: dict[str, Ready] = field(default_factory=dict)
    limits: Limits | None = None
    force_shutdown: bool = False
    warm: bool = False
    drain_until: float | None = None
    giving_up_until: float | None = None
    grace: float = END_GRACE
    notifier: Notifier = field(default_factory=Notifier)
    socket_passed: bool = False

    @property
    def serves(self) -> bool:
        """Whether this is the machine with the frontend; others compute some of the ranks."""
        return not self.run.server.node_rank


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
        Restarts(server.max_restarts, server.restart_window), force_shutdown=switch("FORCE_SHUTDOWN"),
        notifier=notifier, socket_passed=socket_passed,
    )  # fmt: skip
    if not tree.serves:
        tree.warm = True  # there is no frontend to say so, and who waits for machine 0 is not ill
    tree.selector.register(signals, selectors.EVENT_READ)
    tree.selector.register(tree.inbox.fileno(), selectors.EVENT_READ)
    try:
        for program in programs:
            _start(tree, program)
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


def _start(tree: Tree, program: Program) -> None:
    tree.board.silence(program.name)
    if program.name == "scheduler":
        tree.board.note_load(0, 0)
    child = start_child(program, tree.config_file, tree.listener)
    tree.children.append(child)
    tree.selector.register(child.output, selectors.EVENT_READ, child)


def _next_look(tree: Tree) -> float:
    """When (time.monotonic()) there may be something to do though nothing has arrived."""
    until = time.monotonic() + tree.watchdog.interval
    return min([until, *tree.due.values(), *filter(None, (tree.drain_until, tree.giving_up_until))])


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
    _kill_hung(tree)
    ended = [child for child in tree.children if child.process.poll() is not None]
    if tree.giving_up_until is not None:
        return _go_on_giving_up(tree, ended)
    if ended and not tree.warm:
        return _report_deaths(tree, ended)
    if tree.drain_until is not None and any(child.program.listens for child in ended):
        return 0 if _is_drained(ended) else _report_deaths(tree, ended)
    for child in ended:
        if child in tree.children:  # it may have gone with another of its group
            _replace(tree, child)
    _start_what_is_due(tree)
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
            if not tree.serves and _is_whole(tree):
                _say_joined(tree)
            if tree.limits is not None and _is_whole(tree):
                tree.frontend.send(Serving(tree.run.epoch, tree.limits))
                if tree.warm:
                    tree.notifier.status(_serving(tree))
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
            _write(sys.stdout, "".join(f"{line}\n" for line in lines).encode())
            tree.notifier.ready(_serving(tree))


def _serving(tree: Tree) -> str:
    running, waiting = tree.board.load
    load = f": {running} requests run, {waiting} wait" if running or waiting else ""
    return f"serving {tree.run.server.served_model_name} on {tree.url}{load}"


def _say_joined(tree: Tree) -> None:
    server = tree.run.server
    ranks = ", ".join(child.program.title for child in tree.children)
    words = f"machine {server.node_rank} of {server.nnodes} computes {ranks} for {server.dist_init_addr}"
    _write(sys.stdout, f"Tokenmill: {words}\n".encode())
    tree.notifier.ready(words)


def _is_whole(tree: Tree) -> bool:
    return not tree.due and all(child.program.name in tree.ready for child in tree.children)


def _tell_load(tree: Tree) -> None:
    """The status line tells how many requests there are, unless there is something else to tell."""
    if tree.warm and tree.drain_until is None and tree.giving_up_until is None and _is_whole(tree):
        tree.notifier.load(_serving(tree))


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
    if not tree.warm:
        return
    running = [child for child in tree.children if not child.hung and child.process.poll() is None]
    for child in tree.watchdog.hung(running, tree.ready):
        child.kill_hung()


def _replace(tree: Tree, child: Child) -> None:
    """Bury a child and see to it that another takes its place, unless too many have died."""
    name, now = child.program.counts_as, time.monotonic()
    delay = tree.restarts.after_death(name, now)
    if delay is None:
        _bury(tree, child, "the server gives up")
        _give_up(tree, name)
        return
    tree.run = msgspec.structs.replace(tree.run, epoch=tree.run.epoch + 1)
    write_run_config(tree.run, tree.config_file)
    mates, struck = _end_mates(tree, child)
    if not child.program.listens:
        suspect = tree.board.held(name) or None
        tree.board.hold(name, 0)
        # A rank ends, or waits, because of one that was killed or stopped.
        certain = child.died_by_itself(tree.board.struck) and not struck
        if tree.serves:
            computed = tree.board.take_computed() if name == "scheduler" else None
            tree.frontend.send(Lost(name, tree.run.epoch, suspect, certain, computed, name in tree.ready))
    _bury(tree, child, "it is started again" + (f" in {delay:g} s" if delay else ""))
    for mate in mates:
        _bury(tree, mate, f"it was ended since {child.program.title} has; it is started again")
    for one in (child, *mates):
        tree.due[one.program] = now + delay
    tree.notifier.status(f"restarting the {name}: {child.describe_end()}")


def _end_mates(tree: Tree, dead: Child) -> tuple[list[Child], bool]:
    """End those who can do nothing without `dead`. Returns them, and whether somebody had killed or stopped one."""
    name, struck = dead.program.counts_as, False
    mates = [child for child in tree.children if child is not dead and child.program.counts_as == name]
    for mate in mates:
        if mate.process.poll() is not None:
            struck = struck or not mate.died_by_itself(tree.board.struck)
        elif dead.hung:
            mate.kill_hung()
            struck = struck or mate.stopped
        else:
            mate.process.kill()
    for mate in mates:
        mate.process.wait()
    return mates, struck


def _give_up(tree: Tree, name: str) -> None:
    """Tell the frontend to fail what is in flight; the server ends once it has done so."""
    server = tree.run.server
    message = (
        f"The server gives up: its processes have died {server.max_restarts + 1} times within "
        f"{server.restart_window:g} s (--max-restarts, --restart-window); the last to die was the {name}."
    )
    log.critical(message)
    tree.notifier.status(message)
    tree.due.clear()
    tree.giving_up_until = time.monotonic() + GIVE_UP_GRACE
    if tree.serves:
        tree.frontend.send(GiveUp(message))


def _go_on_giving_up(tree: Tree, ended: list[Child]) -> int | None:
    for child in ended:
        _bury(tree, child, "the server ends")
    frontend_left = any(child.program.listens for child in tree.children)
    assert tree.giving_up_until is not None
    return None if frontend_left and time.monotonic() < tree.giving_up_until else 1


def _bury(tree: Tree, child: Child, consequence: str) -> None:
    """Say how a child has ended, and forget it."""
    _pass_on(tree, child)
    last = "".join(f"    {line}\n" for line in child.tail)
    _write(sys.stderr, f"error: {child.describe_end()}; {consequence}. Its last lines:\n{last}".encode())
    if child.output in tree.selector.get_map():
        tree.selector.unregister(child.output)
    assert child.process.stdout is not None
    child.process.stdout.close()
    tree.children.remove(child)
    tree.ready.pop(child.program.name, None)


def _start_what_is_due(tree: Tree) -> None:
    for program, when in list(tree.due.items()):
        if time.monotonic() >= when:
            del tree.due[program]
            _start(tree, program)


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
