"""How a process of the tree begins: its arguments, its name, its bond to the launcher, its ready message."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import zmq
from setproctitle import setproctitle

from engine.config import ConfigError, RunConfig, faults, read_run_config
from engine.config.file_limit import raise_file_limit
from engine.config.logs import set_up_logging
from engine.wire.board import Board
from engine.wire.lifecycle import Limits, Ready, ToLauncher
from engine.wire.sockets import Outbox
from engine.wire.struck import watch

_PR_SET_PDEATHSIG = 1
FAILED = 1
"""Exit code of a process that an exception has ended."""

logger = logging.getLogger(__name__)


def arguments(description: str, *, rank: bool = False, listen_fd: bool = False) -> argparse.Namespace:
    """Parse a process's own command line: `--config FILE`, and `--rank` or `--fd` where it takes one."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", type=Path, required=True, help="RunConfig as JSON, written by the launcher")
    if rank:
        parser.add_argument("--rank", type=int, default=0, help="tensor-parallel rank")
    if listen_fd:
        parser.add_argument("--fd", type=int, default=None, help="descriptor of the listening socket")
    return parser.parse_args()


def begin(config_path: Path, name: str) -> RunConfig:
    """Tie this process to the launcher, name it, set up its logging, and return the configuration.

    The process ends with SIGKILL when its launcher dies, however it dies. Ctrl-C is left to the launcher.
    """
    config = read_run_config(config_path)
    _end_with_parent(config.launcher_pid)
    watch(Board(config.runtime_dir))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    setproctitle(f"tokenmill: {name}")
    try:
        level = config.standing.log_level or config.server.log_level
        set_up_logging(level, name, config.server.log_format, messages=_may_quote(config, name))
        raise_file_limit()
        faults.arm_from_environment()
    except ConfigError as error:
        sys.exit(f"error: {error}")
    return config


def _may_quote(config: RunConfig, name: str) -> bool:
    """Whether the messages of exceptions may be logged: the scheduler's hold no texts, and whoever has requests logged
    with their texts has asked for them."""
    server = config.server
    return name.startswith("scheduler") or (server.log_requests and server.log_requests_level >= 2)


def report_ready(context: zmq.Context[Any], config: RunConfig, name: str, limits: Limits | None = None) -> None:
    """Tell the launcher that this process can take messages."""
    outbox: Outbox[ToLauncher] = Outbox(context, config.runtime_dir, "launcher")
    outbox.send(Ready(name, os.getpid(), limits))
    outbox.close()
    logger.debug("ready")


def play(main: Callable[[], None]) -> None:
    """Run the `main` of a process. An exception that escapes it, or the work of a thread of its, ends the process."""
    threading.excepthook = _thread_failed
    try:
        main()
    except SystemExit:
        raise
    except BaseException as error:  # the panics of Rust libraries are no Exception
        fail(error)


def fail(error: BaseException) -> NoReturn:
    """Log `error` with its traceback and end this process here and now, as any other crash would.

    Nothing is waited for. The interpreter's own end joins threads that may have work for minutes, and an event loop's
    end waits for its connections: until the last of them is done nobody would know that this process is dead.
    """
    try:
        # Its words may quote a prompt: they stand in the traceback alone.
        logger.critical("%s: nobody caught it, and this process ends", type(error).__name__, exc_info=error)
    finally:
        leave()


def leave() -> NoReturn:
    """End this process here and now, with what it has logged written."""
    try:
        logging.shutdown()
    finally:
        os._exit(FAILED)


def _thread_failed(what: threading.ExceptHookArgs) -> None:
    if what.exc_value is not None and not isinstance(what.exc_value, SystemExit):
        fail(what.exc_value)


def _end_with_parent(launcher_pid: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher_pid:
        sys.exit(f"the launcher (pid {launcher_pid}) is gone")
