"""Names and numbers of other hosts."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from engine.wire.addresses import address_of, is_loopback, tcp

V4 = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.7", 5000))
V6 = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::7", 5000, 0, 0))


def test_numbers() -> None:
    assert address_of("127.0.0.1", 5000) == (socket.AF_INET, "127.0.0.1", ("127.0.0.1", 5000))
    assert address_of("::1", 5000)[:2] == (socket.AF_INET6, "::1")
    assert (tcp("127.0.0.1"), tcp("::1", "7")) == ("tcp://127.0.0.1:*", "tcp://[::1]:7")
    found = [is_loopback(host) for host in ("127.0.0.2", "::1", "10.0.0.1", "fe80::1%lo")]
    assert found == [True, True, False, False]


@pytest.mark.parametrize(("known", "wanted"), [([V6, V4], V4), ([V4, V6], V4), ([V6], V6)])
def test_a_name_leads_to_ipv4_where_it_can(known: Any, wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, type: known)
    assert address_of("machine0", 5000) == (wanted[0], wanted[4][0], wanted[4])


def test_a_name_that_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, type: [])
    with pytest.raises(OSError, match="machine0 has neither an IPv4 nor an IPv6 address"):
        address_of("machine0", 5000)
