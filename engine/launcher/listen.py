"""The listening socket, which the launcher owns and hands to the frontend."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import MutableMapping

from engine.launcher.errors import LaunchError

BACKLOG = 2048
FIRST_PASSED = 3
"""The descriptor at which those that a service manager passes begin."""
SOCKET_NAME = "http"
"""Where several sockets are passed, the one with this FileDescriptorName is served."""


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


def take_listener(environment: MutableMapping[str, str]) -> socket.socket | None:
    """The listening socket that a service manager has passed (sd_listen_fds(3)); None: it has passed none.

    The variables that say so are removed from `environment` (os.environ), and the socket from what children inherit
    by themselves. The manager keeps the socket open: connections that come while no server runs wait in its accept
    queue. Raises LaunchError for what is not one listening TCP socket.
    """
    pid, count, names = (environment.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if not count or pid != str(os.getpid()):
        return None
    if not count.isascii() or not count.isdigit():
        raise LaunchError(f"LISTEN_FDS: {count!r}: must be a whole number, 0 or more")
    passed = range(FIRST_PASSED, FIRST_PASSED + int(count))
    for descriptor in passed:
        _keep_from_children(descriptor)
    if not passed:
        return None
    return _checked(_chosen(passed, names.split(":")))


def _keep_from_children(descriptor: int) -> None:
    try:
        os.set_inheritable(descriptor, False)
    except OSError as error:
        raise LaunchError(f"LISTEN_FDS: descriptor {descriptor} was passed but is not open: {error}") from None


def _chosen(passed: range, names: list[str]) -> int:
    if len(passed) == 1:
        return passed[0]
    named = [descriptor for descriptor, name in zip(passed, names, strict=False) if name == SOCKET_NAME]
    if len(named) != 1:
        raise LaunchError(
            f"LISTEN_FDS: {len(passed)} sockets were passed, and {len(named)} of them with FileDescriptorName "
            f"{SOCKET_NAME} (LISTEN_FDNAMES: {':'.join(names)!r}); one socket is served, so give one ListenStream "
            "(an IPv6 address with BindIPv6Only=both takes IPv4 as well)"
        )
    return named[0]


def _checked(descriptor: int) -> socket.socket:
    try:
        listener = socket.socket(fileno=descriptor)
    except OSError as error:
        raise LaunchError(f"LISTEN_FDS: descriptor {descriptor} is no socket: {error}") from None
    if listener.family not in (socket.AF_INET, socket.AF_INET6) or listener.type != socket.SOCK_STREAM:
        kind = f"{listener.family!s}, {listener.type!s}"
        listener.detach()
        raise LaunchError(
            f"LISTEN_FDS: descriptor {descriptor} is not a TCP socket ({kind}): give it ListenStream=PORT"
        )
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        listener.detach()
        raise LaunchError(f"LISTEN_FDS: descriptor {descriptor} does not listen: its unit must have Accept=no")
    return listener


def url_of(listener: socket.socket, *, tls: bool) -> str:
    """The address of a listener as a URL."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if listener.family == socket.AF_INET6 else host
    return f"{'https' if tls else 'http'}://{shown}:{port}"
