"""Uvicorn on the listening socket that the launcher has opened."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

import uvicorn
import uvloop
import zmq

from engine.config import ConfigError, RunConfig, ServerConfig
from engine.config.environment import number
from engine.wire.process import fail, report_ready
from http_frontend.app import build_app
from http_frontend.connections import connection_class, sweep
from http_frontend.frontend import Frontend
from http_frontend.turnstile import ACCEPTED

BACKLOG = 2048
"""Connections that the kernel keeps until they are accepted."""
_HANDSHAKE_SECONDS = 10.0
"""Most time for a handshake of TLS; less where --request-read-timeout is less."""
_CLOSING_SECONDS = 5
"""Time that connections get, once nothing is in flight, to take what was sent to them."""


def serve(run: RunConfig, listener: socket.socket) -> None:
    """Serve until the launcher's `Drain` has been carried out. What breaks the frontend ends this process."""
    loop = functools.partial(_Loop, min(run.server.request_read_timeout, _HANDSHAKE_SECONDS))
    with asyncio.Runner(loop_factory=loop) as runner, zmq.Context() as context:
        runner.run(_serve(run, listener, context))


class _Loop(uvloop.Loop):
    """Uvloop's, with a time of its own for the handshakes of TLS: uvicorn passes none on, and knows nothing of a
    connection until its handshake is done."""

    def __init__(self, handshake_seconds: float) -> None:
        super().__init__()
        self._handshake_seconds = handshake_seconds

    async def create_server(self, *arguments: Any, **named: Any) -> asyncio.Server:
        if named.get("ssl") is not None:
            named["ssl_handshake_timeout"] = self._handshake_seconds
        return cast("asyncio.Server", await super().create_server(*arguments, **named))


class _Server(uvicorn.Server):
    """Signals are the launcher's business: it drains this process by message."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # What start-up has made lives until the end: the collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        self._on_started()

    def stop_accepting(self) -> None:
        for listening in self.servers:
            listening.close()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(run: RunConfig, listener: socket.socket, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    frontend = Frontend(run, context)
    frontend.start(asyncio.get_running_loop())
    config = _uvicorn_config(run.server, frontend)
    server = _Server(config, lambda: report_ready(context, run, "frontend"))
    frontend.stop_accepting = server.stop_accepting
    # libuv accepts one connection of a socket in a turn of the loop. In a rush, a turn answers a request, and a health
    # check would be behind hundreds of connections; so the socket is there several times.
    listeners = [listener, *(listener.dup() for _ in range(ACCEPTED - 1))]
    serving = asyncio.create_task(server.serve(sockets=listeners))
    sweeping = asyncio.create_task(sweep(server.server_state.connections, run.server))
    try:
        await asyncio.wait({frontend.ended, serving, sweeping}, return_when=asyncio.FIRST_COMPLETED)
        for work in (frontend.ended, serving, sweeping):
            # Uvicorn would serve its connections for seconds more, with a frontend that nothing can be got from.
            if work.done() and (error := work.exception()) is not None:
                fail(error)
        sweeping.cancel()
        server.should_exit = True
        await serving
    finally:
        frontend.ring.close()


def _uvicorn_config(server: ServerConfig, frontend: Frontend) -> uvicorn.Config:
    """Raises ConfigError for TLS files that are none."""
    _set_up_access_log(server)
    config = uvicorn.Config(
        build_app(frontend),
        http=connection_class(server, frontend.turnstile),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=None,
        access_log=logging.getLogger("uvicorn.access").isEnabledFor(logging.INFO),
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=int(number("TIMEOUT_KEEP_ALIVE", 5)),
        timeout_graceful_shutdown=_CLOSING_SECONDS,
        ssl_keyfile=server.ssl_keyfile,
        ssl_certfile=server.ssl_certfile,
        ssl_ca_certs=server.ssl_ca_certs,
        ssl_cert_reqs=server.ssl_cert_reqs,
        ssl_keyfile_password=server.ssl_keyfile_password,
    )
    try:
        config.load()
    except OSError as error:  # as which the ssl module tells what is wrong with a key, a certificate or a password
        files = [server.ssl_keyfile, server.ssl_certfile, *([server.ssl_ca_certs] if server.ssl_ca_certs else [])]
        raise ConfigError(f"the --ssl-... files {', '.join(map(str, files))} cannot be used: {error}") from None
    return config


def _set_up_access_log(server: ServerConfig) -> None:
    """The access log has a level of its own, and leaves out the paths that the user does not want to see."""
    logger = logging.getLogger("uvicorn.access")
    logger.setLevel((server.log_level_http or server.log_level).upper())
    excluded = tuple(server.uvicorn_access_log_exclude_prefixes)
    if excluded:
        logger.addFilter(lambda record: not _path_of(record).startswith(excluded))
    # Its start and stop lines say what the launcher says better.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


def _path_of(record: logging.LogRecord) -> str:
    """The path of an access record, whose arguments are (client, method, path, HTTP version, status)."""
    return str(record.args[2]) if isinstance(record.args, tuple) and len(record.args) > 2 else ""
