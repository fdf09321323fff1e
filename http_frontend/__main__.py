"""The frontend process: `python -m http_frontend --config FILE --fd N`."""

from __future__ import annotations

import socket
import sys

from engine.config import ConfigError
from engine.wire.process import arguments, begin, play
from http_frontend.server import serve


def main() -> None:
    """Serve on descriptor --fd, a listening socket; without one, on the configured host and port."""
    words = arguments("Serve the native HTTP API and own the requests in flight.", listen_fd=True)
    run = begin(words.config, "frontend")
    if words.fd is None:
        listener = socket.create_server((run.server.host, run.server.port), reuse_port=False)
    else:
        listener = socket.socket(fileno=words.fd)
    try:
        serve(run, listener)
    except ConfigError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    play(main)
