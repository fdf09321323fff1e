"""The listening socket, which the launcher owns and hands to the frontend."""

from __future__ import annotations

import errno
import socket

from engine.launcher.errors import LaunchError

BACKLOG = 2048


def open_listener(host: str, port: int) -> socket.socket:
    """Listen on TCP `host`:`port`; port 0 takes a free one. Raises LaunchError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise LaunchError(f"--host {host}: not an address of this machine: {error}") from None
    # A name with addresses of both families, as localhost often is, is served on IPv4: clients that are told the name
    # try both, clients that are told 127.0.0.1 do not.
    family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise LaunchError(
                f"port {port} of {host} is in use by another program; choose another with --port"
            ) from None
        raise LaunchError(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    return listener


def url_of(listener: socket.socket, *, tls: bool) -> str:
    """The address of a listener as a URL."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if listener.family == socket.AF_INET6 else host
    return f"{'https' if tls else 'http'}://{shown}:{port}"
