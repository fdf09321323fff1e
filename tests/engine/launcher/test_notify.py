"""The notify protocol and the passed socket, over processes that only play their part; the real ones are in
tests/e2e/test_service.py."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest
from service_manager import Service, service
from test_launcher import CHECKPOINT, HERE, REPOSITORY

from engine.launcher import notify
from engine.launcher.errors import LaunchError
from engine.launcher.listen import take_listener
from engine.launcher.notify import Notifier, take_notifier
from engine.wire.board import Board


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("s", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CHECKPOINT))
    return tmp_path


def command(folder: Path, **wish: object) -> list[str]:
    config = {"model_path": str(folder / "model"), "skip_tokenizer_init": True, "port": 0, "drain_timeout": 33.0}
    return [sys.executable, str(HERE / "fake_tree.py"), json.dumps({"config": config, **wish})]


def environment(folder: Path) -> dict[str, str]:
    return {"PYTHONPATH": f"{REPOSITORY}:{HERE}", "XDG_RUNTIME_DIR": str(folder / "s")}


def environments(running: Service) -> list[dict[str, str]]:
    """Of the service's children."""
    return [child.environ() for child in psutil.Process(running.process.pid).children()]


@pytest.mark.parametrize("abstract", [False, True])
def test_from_ready_to_stopping(folder: Path, abstract: bool) -> None:
    with service(command(folder), folder, abstract=abstract, watchdog=0.2, env=environment(folder)) as running:
        ready = running.hear(READY="1")
        assert ready["MAINPID"] == str(running.process.pid)
        assert ready["STATUS"].startswith(f"serving {folder / 'model'} on http://127.0.0.1:")
        statuses = [told["STATUS"] for told in running.told if "STATUS" in told]
        assert [status.partition(" ")[0] for status in statuses] == ["finding", "loading", "serving"]
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
            assert not [env for env in environments(running) if name in env], name
        began = time.monotonic()
        for _ in range(5):
            running.hear(WATCHDOG="1")
        assert time.monotonic() - began > 0.3  # one each 0.1 s, and not as fast as they can
        running.process.send_signal(signal.SIGTERM)
        stopping = running.hear(STOPPING="1")
        assert "requests in flight finish" in stopping["STATUS"]
        # The manager is asked for the whole drain, its margin, and the time to end the processes.
        assert int(stopping["EXTEND_TIMEOUT_USEC"]) == 41_000_000
        assert running.ends() == 0


def test_a_stopped_launcher_feeds_no_watchdog(folder: Path) -> None:
    with service(command(folder), folder, watchdog=0.2, env=environment(folder)) as running:
        running.hear(READY="1")
        running.hear(WATCHDOG="1")
        running.process.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        running.manager.setblocking(False)
        while True:
            try:
                running.read()
            except BlockingIOError:
                break
        time.sleep(0.5)
        with pytest.raises(BlockingIOError):
            running.read()


def test_a_process_that_is_replaced_is_told(folder: Path) -> None:
    with service(command(folder), folder, watchdog=0.2, env=environment(folder)) as running:
        serving = running.hear(READY="1")["STATUS"]
        children = psutil.Process(running.process.pid).children()
        (scheduler,) = [child for child in children if child.cmdline()[0] == "tokenmill: scheduler"]
        scheduler.kill()
        running.hear(STATUS=f"restarting the scheduler: the scheduler (pid {scheduler.pid}) was killed by SIGKILL "
                     "(by someone, or by the system because memory ran out)")  # fmt: skip
        running.hear(STATUS=serving)
        running.hear(WATCHDOG="1")
        (runtime,) = (folder / "s").iterdir()
        board = Board(str(runtime))
        for load, words in (((3, 2), ": 3 requests run, 2 wait"), ((0, 0), "")):
            board.note_load(*load)
            running.hear(STATUS=serving + words)
        board.close()
        running.process.terminate()
        assert running.ends() == 0


def test_a_failed_start_is_told(folder: Path) -> None:
    (folder / "model" / "config.json").unlink()
    with service(command(folder), folder, env=environment(folder)) as running:
        assert running.ends() == 1
        status = running.last("STATUS")
        assert status is not None and status.startswith("error: ") and "config.json" in status
        assert not [told for told in running.told if "READY" in told]


def test_a_signal_while_loading_is_told(folder: Path) -> None:
    with service(command(folder, manners={"scheduler": "loads"}), folder, env=environment(folder)) as running:
        running.hear(STATUS=f"loading {folder / 'model'}")
        # A start that works is given more time.
        if not running.last("EXTEND_TIMEOUT_USEC"):
            running.hear(EXTEND_TIMEOUT_USEC="60000000")
        running.process.terminate()
        running.hear(STOPPING="1")
        assert running.ends() == 0


def test_a_start_that_does_nothing_gets_no_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    spent = iter([1.0, 1.0, 1.01, 2.0, 0.5])
    sent: list[object] = []
    notifier = Notifier("/nowhere")

    def next_spent() -> float:
        value = next(spent)
        if value == 0.5:  # a child has ended, and another has begun
            notifier._end_loading()
        return value

    monkeypatch.setattr(notify, "_processor_seconds", next_spent)
    monkeypatch.setattr(notify, "LOADING_LOOK", 0.001)
    monkeypatch.setattr(Notifier, "send", lambda _, **fields: sent.append(fields))
    notifier.loading("a model")
    assert notifier._loaded is not None and notifier._loaded.wait(10)
    deadline = time.monotonic() + 10
    while len(sent) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sent == [{"STATUS": "a model"}, *[{"EXTEND_TIMEOUT_USEC": 60_000_000}] * 3]


def test_requests_wait_in_the_queue_of_a_passed_socket(folder: Path) -> None:
    """The fake frontend never accepts: what connects waits until a server does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        for _ in range(2):
            with service(command(folder), folder, listener=listener, env=environment(folder)) as running:
                ready = running.hear(READY="1")
                assert ready["STATUS"].endswith(f" on http://127.0.0.1:{address[1]}")
                for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"):
                    assert not [env for env in environments(running) if name in env], name
                with socket.create_connection(address, timeout=5):
                    running.process.terminate()
                    assert running.ends() == 0
                log = running.log.read_text()
                assert "frontend has /dev/null, pipe, pipe, listener\n" in log
                assert "scheduler has /dev/null, pipe, pipe\n" in log
        listener.settimeout(5)
        listener.accept()[0].close()
        listener.accept()[0].close()


def test_descriptors_for_many_connections(folder: Path) -> None:
    """Each process of the tree raises a low soft limit to the hard one."""
    limited = ["/bin/sh", "-c", 'ulimit -Sn 256; ulimit -Hn 3000; exec "$@"', "sh", *command(folder)]
    with service(limited, folder, env=environment(folder)) as running:
        running.hear(READY="1")
        for process in psutil.Process(running.process.pid).children():
            assert process.rlimit(psutil.RLIMIT_NOFILE) == (3000, 3000)
        running.process.terminate()
        assert running.ends() == 0


def passed(**variables: str) -> dict[str, str]:
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "OTHER": "x", **variables}


def test_variables_that_are_not_for_this_process_count_for_nothing() -> None:
    for variables in ({"LISTEN_PID": "1"}, {"LISTEN_FDS": "0"}, {"LISTEN_FDS": ""}):
        given = passed(**variables)
        assert take_listener(given) is None
        assert given == {"OTHER": "x"}
    given = {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1", "OTHER": "x"}
    assert take_notifier(given) == Notifier("/run/x", None)
    assert given == {"OTHER": "x"}
    assert take_notifier({"WATCHDOG_USEC": "3000000"}) == Notifier()
    assert take_notifier({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "3000000"}) == Notifier("@x", 1.5)


def test_what_was_passed_must_be_one_listening_tcp_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refusal(descriptor: int, **variables: str) -> str:
        monkeypatch.setattr("engine.launcher.listen.FIRST_PASSED", descriptor)
        with pytest.raises(LaunchError) as error:
            take_listener(passed(**variables))
        return str(error.value)

    with socket.socket() as silent, socket.socket(socket.AF_UNIX) as local, (tmp_path / "file").open("w") as file:
        local.bind(str(tmp_path / "socket"))
        local.listen()
        assert "does not listen" in refusal(silent.fileno())
        assert "not a TCP socket" in refusal(local.fileno())
        assert "is no socket" in refusal(file.fileno())
        assert "is not open" in refusal(1000)
        assert "'three': must be a whole number" in refusal(silent.fileno(), LISTEN_FDS="three")
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        low, high = sorted((one, other), key=socket.socket.fileno)
        if high.fileno() == low.fileno() + 1:
            names = {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "http:http"}
            assert "2 sockets were passed, and 2 of them" in refusal(low.fileno(), **names)
            taken = take_listener(passed(LISTEN_FDS="2", LISTEN_FDNAMES="metrics:http"))
            assert taken is not None and taken.detach() == high.fileno()


def test_variables_that_cannot_be_are_said() -> None:
    with pytest.raises(LaunchError, match="NOTIFY_SOCKET: 'x': must be a path"):
        take_notifier({"NOTIFY_SOCKET": "x"})
    with pytest.raises(LaunchError, match="WATCHDOG_USEC: '0': must be a whole number of microseconds"):
        take_notifier({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "0"})


def test_a_manager_that_is_gone_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier(str(tmp_path / "gone"))
    with caplog.at_level(logging.WARNING):
        notifier.status("a")
        notifier.status("b\nREADY=1")
    assert len(caplog.records) == 1 and "cannot be told" in caplog.text


def test_a_status_cannot_smuggle_a_second_field(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        Notifier(str(tmp_path / "notify")).status("b\nREADY=1")
        assert manager.recv(1000) == b"STATUS=b READY=1"
