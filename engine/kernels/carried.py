"""Ranks on several hosts: torch.distributed (gloo) carries their parts from host to host."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from engine.kernels import _cpu
from engine.parallel.group import GroupLostError

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
    it takes that of the host's name, which is often the loopback's."""
    if os.environ.get(INTERFACE):
        return
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing, and picks the route
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.split("%")[0] == own for one in addresses):
            os.environ[INTERFACE] = name
            return
