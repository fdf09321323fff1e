"""Deaths of processes that serve: what is started again, when, and when the launcher gives up."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
from test_launcher import Launch, Start, start

from engine.launcher.restarts import Restarts
from engine.wire.board import Board

__all__ = ["start"]


def pid_of(launch: Launch, name: str) -> int:
    """The pid of the process that plays `name` now."""
    return next(
        child.pid
        for child in psutil.Process(launch.process.pid).children()
        if child.status() != psutil.STATUS_ZOMBIE and child.cmdline()[:1] == [f"tokenmill: {name}"]
    )


def test_a_program_that_keeps_dying_waits_longer_and_longer() -> None:
    restarts = Restarts(100, 1000.0)
    assert restarts.after_death("a", 0.0) == 0.0
    assert [restarts.after_death("a", now) for now in (1.0, 2.0, 4.0, 7.0, 12.0, 18.0)] == [
        0.5,
        1.0,
        2.0,
        4.0,
        5.0,
        5.0,
    ]
    assert restarts.after_death("b", 18.0) == 0.0
    assert restarts.after_death("a", 60.0) == 0.0


def test_too_many_deaths_within_the_window_are_the_end() -> None:
    restarts = Restarts(2, 10.0)
    assert [restarts.after_death(name, now) for name, now in (("a", 0.0), ("b", 9.0), ("c", 11.0), ("a", 12.0))] == [
        0.0, 0.0, 0.0, None,
    ]  # fmt: skip


def test_a_fault_of_its_own_is_told_from_one_that_is_sent(start: Start) -> None:
    with start(manners={"scheduler": "faults"}) as launch:
        launch.hear_ready()
        for epoch, (number, certain) in enumerate(((signal.SIGUSR1, True), (signal.SIGSEGV, False)), 1):
            os.kill(pid_of(launch, "scheduler"), number)
            launch.hear(f"serving epoch {epoch} with")
            assert f"lost the scheduler in epoch {epoch}, suspect None, certain {certain}" in launch.said
        assert launch.said.count("was killed by SIGSEGV") == 2
        os.kill(pid_of(launch, "tokenizer"), signal.SIGTERM)
        launch.hear("lost the tokenizer in epoch 3, suspect None, certain False")
        launch.hear("serving epoch 3 with")
        launch.process.terminate()
        assert launch.ends() == 0


def test_one_that_dies_before_it_is_ready_is_said_to(start: Start) -> None:
    with start(manners={"scheduler": "unborn"}) as launch:
        launch.hear_ready()
        os.kill(pid_of(launch, "scheduler"), signal.SIGKILL)
        launch.hear("serving epoch 2 with")
        assert "in epoch 1, suspect None, certain False, computed [], loaded True" in launch.said
        assert "in epoch 2, suspect None, certain True, computed [], loaded False" in launch.said
        launch.process.terminate()
        assert launch.ends() == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_child_that_dies_is_started_again(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    with start() as launch:
        launch.hear_ready()
        (folder,) = (tmp_path / "s").iterdir()
        board = Board(str(folder))
        board.hold("scheduler", 77)
        board.note_computed([77, 78])
        os.kill(launch.pids()["the scheduler"], number)
        launch.hear("serving epoch 1 with 1000 tokens")
        assert "lost the scheduler in epoch 1, suspect 77, certain False, computed [77, 78], loaded True" in launch.said
        assert f"was killed by {number.name}" in launch.said and "it is started again. Its last lines:" in launch.said
        assert board.held("scheduler") == 0 and board.take_computed() == []
        board.note_computed([79])
        os.kill(launch.pids()["the tokenizer"], number)
        launch.hear("serving epoch 2 with 1000 tokens")
        assert "lost the tokenizer in epoch 2, suspect None, certain False, computed None" in launch.said
        assert board.take_computed() == [79]  # the scheduler lives
        os.kill(launch.pids()["the frontend"], number)
        launch.hear("serving epoch 3 with 1000 tokens")
        launch.hear("the frontend serves again")
        board.close()
        launch.process.terminate()
        assert launch.ends() == 0
        assert "draining for 33 s" in launch.said


def test_a_child_that_hangs_is_replaced(start: Start) -> None:
    with start(config={"watchdog_timeout": 1.0, "soft_watchdog_timeout": 0.4}) as launch:
        launch.hear_ready()
        for epoch, name in enumerate(("detokenizer", "scheduler"), 1):
            os.kill(pid_of(launch, name), signal.SIGSTOP)
            launch.hear(f"serving epoch {epoch} with")
            assert f"the {name} (pid {launch.pids()[f'the {name}']}) hung and was killed; it is started" in launch.said
            assert f"lost the {name} in epoch {epoch}, suspect None, certain False" in launch.said
        launch.process.terminate()
        assert launch.ends() == 0
        assert "has shown no sign of life for 0." in launch.said  # the soft one's word


def test_a_child_that_hangs_at_its_first_load_ends_the_server(start: Start) -> None:
    with start(manners={"scheduler": "loads"}, config={"watchdog_timeout": 0.4}, first_load=1.0) as launch:
        assert launch.ends() == 1
        assert "still loading" in launch.said
        assert "hung and was killed; the server ends" in launch.said


def test_children_that_die_too_often_end_the_server(start: Start) -> None:
    with start(manners={"scheduler": "dies"}, config={"max_restarts": 2}) as launch:
        launch.hear_ready()
        os.kill(launch.pids()["the scheduler"], signal.SIGKILL)
        assert launch.ends() == 1
        assert "it is started again in 0.5 s" in launch.said
        assert "told: The server gives up: its processes have died 3 times within 300 s" in launch.said
        assert "exited with code 7; the server gives up" in launch.said


def test_a_child_that_dies_in_a_drain_is_replaced(start: Start) -> None:
    """What is in flight finishes; the end of the frontend is the end of the drain, and a clean one if its own was."""
    with start(manners={"frontend": "holds"}) as launch:
        launch.hear_ready()
        os.kill(launch.pids()["the scheduler"], signal.SIGKILL)
        launch.process.terminate()
        launch.hear("draining for 33 s")
        launch.hear("serving epoch 1 with")
        os.kill(pid_of(launch, "tokenizer"), signal.SIGKILL)
        launch.hear("serving epoch 2 with")
        os.kill(pid_of(launch, "frontend"), signal.SIGKILL)
        assert launch.ends() == 1
        assert "the frontend" in launch.said and "the server ends" in launch.said
