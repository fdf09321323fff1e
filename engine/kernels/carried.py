"""Ranks on several hosts: torch.distributed (gloo) carries their parts from host to host."""

from __future__ import annotations

import logging
import os
import socket
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from engine.config import ConfigError
from engine.kernels import _cpu
from engine.parallel.group import GroupLostError
from engine.wire.addresses import address_of

logger = logging.getLogger(__name__)

INTERFACE = "GLOO_SOCKET_IFNAME"


def open_carried_exchange(
    store: Any, rank: int, ranks: int, part_bytes: int, *, timeout: float
) -> _cpu.CarriedExchange:
    """Meet the other ranks, and exchange parts with them from then on.

    Everyone's whole parts are carried to everyone and added up there, in the order of the ranks: the sums that gloo
    itself computes depend on where in the message a value stands. store: a torch.distributed.TCPStore, where the ranks
    find one another. timeout: seconds for the meeting, and later for a rank that stays away. Once in a process. Raises
    GroupLostError.
    """
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout))
        dist.barrier()
    except RuntimeError as error:
        raise GroupLostError(f"rank {rank} of {ranks} has not met the others within {timeout:g} s: {error}") from None
    views: list[list[torch.Tensor]] = []

    def carry(slot: int, count: int) -> None:
        parts = [view[:count] for view in views[slot]]
        dist.all_gather(parts, parts[rank])

    exchange = _cpu.CarriedExchange(rank, ranks, part_bytes, carry)
    views += [[torch.from_numpy(exchange.part(other, slot)) for other in range(ranks)] for slot in (0, 1)]
    return exchange


def choose_interface(host: str, port: int) -> None:
    """Have gloo use the interface on which this host reaches another one, unless the environment names one: by itself
    it takes that of the host's name, which is often the loopback's.

    Raises ConfigError for an interface that this host lacks, and OSError where the other one has no address or cannot
    be reached.
    """
    interfaces = psutil.net_if_addrs()
    if named := os.environ.get(INTERFACE):
        if lacking := [name for name in named.split(",") if name not in interfaces]:
            there = ", ".join(sorted(interfaces))
            raise ConfigError(f"{INTERFACE} is {named!r}: this machine has no interface {lacking[0]!r}, but {there}")
        return
    family, number, full = address_of(host, port)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(full)  # sends nothing, and picks the route
        own = probe.getsockname()[0]
    for name, addresses in interfaces.items():
        if own in [one.address.partition("%")[0] for one in addresses]:
            os.environ[INTERFACE] = name
            return
    there = ", ".join(f"{name} ({', '.join(one.address for one in found)})" for name, found in interfaces.items())
    logger.warning(
        "%s is reached from %s, which is no address of an interface here (%s): gloo takes the one of this host's name, "
        "unless %s names another", number, own, there, INTERFACE,
    )  # fmt: skip
