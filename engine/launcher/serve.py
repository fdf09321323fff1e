"""`tokenmill serve`: from a checked configuration to a server that has ended."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence

import msgspec
import zmq
from setproctitle import setproctitle

from engine.checkpoints.errors import CheckpointError
from engine.config import ConfigError, RunConfig, ServerConfig, write_run_config
from engine.config.logs import set_up_logging
from engine.launcher.children import PROGRAMS, Program, with_workers
from engine.launcher.errors import LaunchError
from engine.launcher.listen import open_listener, take_listener, url_of
from engine.launcher.notify import Notifier, take_notifier
from engine.launcher.resolve import resolve
from engine.launcher.runtime_dir import runtime_dir
from engine.launcher.signals import caught_signals
from engine.launcher.supervise import supervise

log = logging.getLogger(__name__)


def serve(
    config: ServerConfig, launch_command: str, warnings: Sequence[str], programs: Sequence[Program] = PROGRAMS
) -> int:
    """Serve until a signal or the death of a process; returns the exit code.

    launch_command: as typed, for `/server_info`. warnings: of the command line, logged here. programs: the processes.
    0: ended by SIGTERM or SIGINT. 1: the model, the address or a process failed. 2: a setting does not fit the model.
    """
    began, started_at = time.monotonic(), time.time()
    setproctitle("tokenmill: launcher")
    notifier = Notifier()
    try:
        set_up_logging(config.log_level, "launcher", config.log_format)
        for warning in warnings:
            log.warning(warning)
        notifier = take_notifier(os.environ)
        passed = take_listener(os.environ)
        with passed or open_listener(config.host, 0 if config.node_rank else config.port) as listener:
            notifier.loading(f"finding the model {config.model_path or '(the bundled one)'}")
            resolved = resolve(config)
            for warning in resolved.warnings:
                log.warning(warning)
            with caught_signals() as signals, runtime_dir() as folder, zmq.Context() as context:
                run = RunConfig(
                    server=msgspec.structs.replace(resolved.server, port=listener.getsockname()[1]),
                    model=resolved.model,
                    tokenizer=resolved.tokenizer,
                    facts=resolved.facts,
                    runtime_dir=str(folder),
                    launcher_pid=os.getpid(),
                    launch_command=launch_command,
                    started_at=started_at,
                    progress_bar=sys.stderr.isatty(),
                )
                config_file = folder / "config.json"
                write_run_config(run, config_file)
                log.debug("model found and configuration written after %.2f s", time.monotonic() - began)
                url = url_of(listener, tls=config.ssl_certfile is not None)
                if passed is not None:
                    log.info("serving on the socket that was passed by the service manager: %s", url)
                notifier.loading(f"loading {run.server.served_model_name}")
                ranked = with_workers(programs, run.server)
                return supervise(
                    run, config_file, ranked, listener, signals, context, url=url, began=began, notifier=notifier,
                    socket_passed=passed is not None,
                )  # fmt: skip
    except (ConfigError, CheckpointError, LaunchError) as error:
        print(f"tokenmill serve: error: {error}", file=sys.stderr)
        notifier.status(f"error: {error}")
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:  # while the model was being found; later, Ctrl-C is one of the caught signals
        return 128 + signal.SIGINT
