"""What follows the death of a process: another one takes its place, or, after too many, the server ends."""

from __future__ import annotations

import logging
import sys
import time

import msgspec

from engine.config import write_run_config
from engine.launcher.children import Child
from engine.launcher.tree import Tree, pass_on, start, write
from engine.wire.lifecycle import GiveUp, Lost

log = logging.getLogger(__name__)

GIVE_UP_GRACE = 7.0
"""Seconds that the frontend gets to fail what is in flight when processes have died too often."""


def replace(tree: Tree, child: Child) -> None:
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


def go_on_giving_up(tree: Tree, ended: list[Child]) -> int | None:
    """Bury who has ended since; returns the exit code when the frontend has told its clients, or had its time."""
    for child in ended:
        _bury(tree, child, "the server ends")
    frontend_left = any(child.program.listens for child in tree.children)
    assert tree.giving_up_until is not None
    return None if frontend_left and time.monotonic() < tree.giving_up_until else 1


def _bury(tree: Tree, child: Child, consequence: str) -> None:
    """Say how a child has ended, and forget it."""
    pass_on(tree, child)
    last = "".join(f"    {line}\n" for line in child.tail)
    write(sys.stderr, f"error: {child.describe_end()}; {consequence}. Its last lines:\n{last}".encode())
    if child.output in tree.selector.get_map():
        tree.selector.unregister(child.output)
    assert child.process.stdout is not None
    child.process.stdout.close()
    tree.children.remove(child)
    tree.ready.pop(child.program.name, None)


def start_what_is_due(tree: Tree) -> None:
    """Start the programs again whose delay is over."""
    for program, when in list(tree.due.items()):
        if time.monotonic() >= when:
            del tree.due[program]
            start(tree, program)


def report_deaths(tree: Tree, ended: list[Child]) -> int:
    """Say of whose end this is the end of the server; returns the exit code."""
    for child in ended:
        pass_on(tree, child)
    for child in ended:
        last = "".join(f"    {line}\n" for line in child.tail)
        write(sys.stderr, f"error: {child.describe_end()}; the server ends. Its last lines:\n{last}".encode())
    return 1
