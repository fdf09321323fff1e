from __future__ import annotations

from collections.abc import Iterator

import pytest

from scripts.live_server import LiveServer, running_server


@pytest.fixture(scope="session")
def default_server() -> Iterator[LiveServer]:
    """The bundled default model with default settings, shared by all tests that only talk to it."""
    with running_server() as server:
        yield server
