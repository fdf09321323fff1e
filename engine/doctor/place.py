"""Where the server would listen, and where its sockets and files would lie."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from engine.config import ServerConfig
from engine.doctor.finding import Finding
from engine.launcher.errors import LaunchError
from engine.launcher.listen import open_listener, url_of
from engine.launcher.runtime_dir import runtime_dir


def port(config: ServerConfig) -> Finding:
    """Take the port and let it go."""
    try:
        with open_listener(config.host, config.port) as listener:
            url = url_of(listener, tls=config.ssl_certfile is not None)
    except LaunchError as error:
        return Finding("port", "error", str(error), "or end what uses it: ss -ltnp shows it")
    everyone = config.host in ("0.0.0.0", "::", "") and config.api_key is None
    if everyone:
        advice = "give --api-key, or --host 127.0.0.1 behind a proxy that asks for one"
        return Finding("port", "warning", f"{url} is free, and open to everyone who can reach it", advice)
    return Finding("port", "ok", f"{url} is free")


def sockets_folder(environment: Mapping[str, str]) -> Finding:
    """Make a folder for sockets as a launch does, and remove it."""
    try:
        with runtime_dir() as folder:
            parent = folder.parent
    except (LaunchError, OSError) as error:
        advice = "set XDG_RUNTIME_DIR to a folder with a short path that this user may write to"
        return Finding("runtime folder", "error", str(error), advice)
    wanted = environment.get("XDG_RUNTIME_DIR")
    if wanted and Path(wanted) != parent:
        reason = "its path is too long for a socket's (107 bytes)" if os.access(wanted, os.W_OK) else "not writable"
        message = f"XDG_RUNTIME_DIR {wanted} is not used ({reason}); sockets lie in {parent}"
        return Finding("runtime folder", "warning", message, "set it to a folder with a short path, or unset it")
    return Finding("runtime folder", "ok", f"sockets lie in {parent}")
