"""The interface that gloo is to use between hosts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from types import SimpleNamespace

import psutil
import pytest

from engine.config import ConfigError
from engine.kernels.carried import INTERFACE, choose_interface


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """As it was, afterwards."""
    before = os.environ.pop(INTERFACE, None)
    yield
    os.environ.pop(INTERFACE, None)
    if before is not None:
        os.environ[INTERFACE] = before


def loopback() -> str:
    return next(name for name, found in psutil.net_if_addrs().items() if "127.0.0.1" in [one.address for one in found])


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_one_that_leads_there(host: str) -> None:
    choose_interface(host, 5000)
    assert os.environ[INTERFACE] == loopback()


def test_the_one_that_is_named_is_left() -> None:
    os.environ[INTERFACE] = loopback()
    choose_interface("no.such.host.invalid", 5000)
    assert os.environ[INTERFACE] == loopback()


def test_one_that_is_not_there_is_refused() -> None:
    os.environ[INTERFACE] = f"{loopback()},nowhere0"
    with pytest.raises(ConfigError, match=r"nowhere0': this machine has no interface 'nowhere0', but .*lo"):
        choose_interface("127.0.0.1", 5000)


def test_where_none_fits_the_log_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    there = {"eth7": [SimpleNamespace(address="192.0.2.9")]}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: there)
    with caplog.at_level(logging.WARNING):
        choose_interface("127.0.0.1", 5000)
    assert INTERFACE not in os.environ
    assert "127.0.0.1 is reached from 127.0.0.1, which is no address of an interface here (eth7 (192.0.2.9))" in (
        caplog.text
    )
