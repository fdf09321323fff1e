"""One frontend process for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_ring import Live, live_frontend


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_frontend(random_seed=3) as one:
        yield one
