"""One launch under way: its processes, and what is known of them."""

from __future__ import annotations

import logging
import selectors
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from engine.config import RunConfig
from engine.launcher.children import Child, Program, start_child
from engine.launcher.notify import Notifier
from engine.launcher.restarts import Restarts
from engine.launcher.watchdog import Watchdog
from engine.wire.board import Board
from engine.wire.lifecycle import FromLauncher, Limits, Ready, ToLauncher
from engine.wire.sockets import Inbox, Outbox

log = logging.getLogger(__name__)


@dataclass
class Tree:
    """One launch under way.

    url: where it serves. began: time.monotonic() at its start. force_shutdown: a signal ends it without a drain.
    grace: seconds between SIGTERM and SIGKILL.
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
    grace: float
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    children: list[Child] = field(default_factory=list)
    due: dict[Program, float] = field(default_factory=dict)
    ready: dict[str, Ready] = field(default_factory=dict)
    limits: Limits | None = None
    force_shutdown: bool = False
    warm: bool = False
    drain_until: float | None = None
    giving_up_until: float | None = None
    notifier: Notifier = field(default_factory=Notifier)
    socket_passed: bool = False

    @property
    def serves(self) -> bool:
        """Whether this is the machine with the frontend; others compute some of the ranks."""
        return not self.run.server.node_rank


def start(tree: Tree, program: Program) -> None:
    """Start a program of the tree, and listen to it."""
    tree.board.silence(program.name)
    if program.name == "scheduler":
        tree.board.note_load(0, 0)
    child = start_child(program, tree.config_file, tree.listener)
    tree.children.append(child)
    tree.selector.register(child.output, selectors.EVENT_READ, child)


def serving(tree: Tree) -> str:
    """What it does, for the service manager's status line."""
    running, waiting = tree.board.load
    load = f": {running} requests run, {waiting} wait" if running or waiting else ""
    return f"serving {tree.run.server.served_model_name} on {tree.url}{load}"


def is_whole(tree: Tree) -> bool:
    """Whether every process is there and ready."""
    return not tree.due and all(child.program.name in tree.ready for child in tree.children)


def pass_on(tree: Tree, child: Child) -> None:
    """Write what a child has written."""
    lines, ended = child.read()
    write(sys.stderr, lines)
    if ended and child.output in tree.selector.get_map():
        tree.selector.unregister(child.output)


def write(stream: TextIO | None, lines: bytes) -> None:
    """Write to stdout or stderr. That it was closed, or cannot be written any more (a terminal that went away is EIO, a
    full disk ENOSPC), is no reason to stop serving."""
    if lines and stream is not None:
        try:
            stream.buffer.write(lines)
            stream.flush()
        except OSError as error:
            log.debug("%s cannot be written: %s", stream.name, error)
