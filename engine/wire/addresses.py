"""Addresses of other hosts, as sockets and ZeroMQ want them."""

from __future__ import annotations

import ipaddress
import socket
from typing import NamedTuple


class Address(NamedTuple):
    """family: AF_INET or AF_INET6. host: the number, not a name. full: what a socket of that family takes."""

    family: socket.AddressFamily
    host: str
    full: tuple[str, int] | tuple[str, int, int, int]


def address_of(host: str, port: int) -> Address:
    """Where a name or a number leads: IPv4 where there is any, which every machine has. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    families = (socket.AF_INET, socket.AF_INET6)
    known = sorted((one for one in found if one[0] in families), key=lambda one: families.index(one[0]))
    if not known:
        raise OSError(f"{host} has neither an IPv4 nor an IPv6 address")
    family, *_, full = known[0]
    return Address(family, str(full[0]), full)  # type: ignore[arg-type]


def tcp(host: str, port: str = "*") -> str:
    """ZeroMQ's form of an address. host: a number."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether a number is of the loopback, which no other machine reaches."""
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback
