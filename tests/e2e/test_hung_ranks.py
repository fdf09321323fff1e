"""A rank that stops to show signs of life while it loads, or while weights are replaced: the group comes back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_hosts import FLAGS, answers, rank_of, two_machines
from test_hosts_weights import PATIENCE, checkpoints, update, wanted
from test_ranks import pid_of_rank

from engine.bench.live_server import LiveServer, running_server

__all__ = ["checkpoints", "wanted"]
WATCHED = ("--watchdog-timeout", "2", "--max-restarts", "1000")


@dataclass
class Pair:
    """Two ranks. worker: rank 1, where there is one. log: of its launcher."""

    server: LiveServer
    worker: Callable[[], psutil.Process | None]
    log: Callable[[], str]

    def other_worker(self, than: psutil.Process) -> psutil.Process:
        """Wait until another process is rank 1."""
        until = time.monotonic() + PATIENCE
        while (found := self.worker()) is None or found.pid == than.pid:
            assert time.monotonic() < until, self.log()
            time.sleep(0.01)
        return found


@contextmanager
def on_one_machine(model: Path, folder: Path) -> Iterator[Pair]:
    with running_server(*FLAGS, *WATCHED, "--tp-size", "2", model=model) as server:

        def worker() -> psutil.Process | None:
            pid = pid_of_rank(server, 1)
            return None if pid is None else psutil.Process(pid)

        yield Pair(server, worker, server.log)


@contextmanager
def on_two_machines(model: Path, folder: Path) -> Iterator[Pair]:
    with two_machines(model, folder, *WATCHED) as (server, machine, log):

        def worker() -> psutil.Process | None:
            try:
                return rank_of(machine)
            except (StopIteration, psutil.NoSuchProcess):
                return None

        yield Pair(server, worker, lambda: log.read_text())


@pytest.mark.parametrize("pair", [on_one_machine, pytest.param(on_two_machines, marks=pytest.mark.slow)])
def test_a_rank_that_hangs_in_a_weight_update(
    pair: Any, checkpoints: tuple[Path, Path], wanted: list[Any], tmp_path: Path
) -> None:
    """The update is done again, and nobody has to wait for more than one rank's timeout."""
    old, new = checkpoints
    with pair(old, tmp_path) as two, ThreadPoolExecutor(1) as pool:
        assert answers(two.server) == wanted[0]
        worker = two.worker()
        worker.suspend()
        told = pool.submit(update, two.server, new)
        assert told.result(PATIENCE)["success"], two.server.log()
        assert answers(two.server) == wanted[1]
        assert f"scheduler tp1 (pid {worker.pid}) hung and was killed" in two.log()
        if pair is on_two_machines:
            assert "scheduler tp0" in two.server.log()
            assert "hung and was killed" not in two.server.log()


@pytest.mark.slow
@pytest.mark.parametrize("pair", [on_one_machine, on_two_machines])
def test_a_rank_that_hangs_while_it_loads_again(
    pair: Any, checkpoints: tuple[Path, Path], wanted: list[Any], tmp_path: Path
) -> None:
    with pair(checkpoints[0], tmp_path) as two:
        first = two.worker()
        first.kill()
        second = two.other_worker(first)
        second.suspend()
        assert answers(two.server) == wanted[0]
        assert f"scheduler tp1 (pid {second.pid}) hung and was killed" in two.log()


@pytest.mark.slow
def test_rank_0_that_hangs_while_it_serves(checkpoints: tuple[Path, Path], wanted: list[Any], tmp_path: Path) -> None:
    """The worker begins anew, and does not die again and again until rank 0 is back."""
    with on_two_machines(checkpoints[0], tmp_path) as two:
        pid = pid_of_rank(two.server, 0)
        assert pid is not None
        first = two.worker()
        assert first is not None
        psutil.Process(pid).suspend()
        assert answers(two.server) == wanted[0]
        assert f"scheduler tp0 (pid {pid}) hung and was killed" in two.server.log()
        assert two.other_worker(first).is_running()
        assert two.log().count("it is started again") <= 2, two.log()
