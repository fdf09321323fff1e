"""Ranks on several hosts: how they find one another, and how they notice that one of them has begun anew.

Rank 0's process holds a store (torch.distributed's TCPStore) at `--dist-init-addr`. There it leaves the addresses at
which workers on other hosts hear it, and they count themselves as they join. The store goes with rank 0; so a worker
that finds it gone ends, and its launcher starts it again, to wait for the next one. All of this, and what ranks say to
one another, is neither encrypted nor authenticated: it is for a network of one's own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from engine.config import ConfigError, RunConfig, ServerConfig
from engine.config.run import Served, with_served
from engine.parallel.group import GroupLostError
from engine.wire.addresses import address_of, is_loopback
from engine.wire.sockets import Inbox, Outbox
from engine.wire.to_worker import RANKS, FromWorker, ToWorker, worker_name

if TYPE_CHECKING:
    from engine.kernels._cpu import Exchange

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks at the store."""
_TRY_SECONDS = 2.0
_JOINED = "joined"
_SERVED = "served"


@dataclass(slots=True)
class Hosts:
    """The store as one rank sees it. beat: called while this waits, as a sign of life. beyond: so many joins are one
    too many; None: only the store must be there."""

    store: Any
    beat: Callable[[], None]
    beyond: int | None = None
    _looked: float = field(default_factory=time.monotonic)

    def look(self) -> None:
        """Raise GroupLostError where rank 0 is gone, or a worker has begun anew; at most once in `LOOK_SECONDS`."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        joined = self._joined()
        if self.beyond is not None and joined >= self.beyond:
            raise GroupLostError("a worker has begun anew")

    def _joined(self) -> int:
        try:
            return int(self.store.add(_JOINED, 0))
        except RuntimeError as error:
            raise GroupLostError(f"rank 0's store does not answer: {_first_line(error)}") from None

    def gather(self, workers: int) -> None:
        """Wait until so many workers have joined, however long that takes. Raises GroupLostError."""
        told = False
        while (joined := self._joined()) < workers:
            if not told:
                logger.info("waiting for the other machines: %d of %d ranks have come", joined + 1, workers + 1)
            told = True
            self.beat()
            time.sleep(0.05)

    def exchange(self, rank: int, ranks: int, part: int, patience: float) -> Exchange:
        """Meet the others, all of which have joined. Raises GroupLostError, also when one begins anew meanwhile."""
        from engine.kernels.carried import open_carried_exchange

        met: Future[Exchange] = Future()
        store = self.store.clone()  # who waits for an answer has the line for himself

        def meet() -> None:
            try:
                met.set_result(open_carried_exchange(store, rank, ranks, part, timeout=patience))
            except BaseException as error:
                met.set_exception(error)

        threading.Thread(target=meet, name="meeting", daemon=True).start()
        while not wait([met], LOOK_SECONDS / 4).done:
            self.beat()
        return met.result()


def rendezvous(server: ServerConfig) -> tuple[str, int]:
    """Host and port of `--dist-init-addr`, which `check_config` has looked at."""
    assert server.dist_init_addr is not None
    host, _, port = server.dist_init_addr.rpartition(":")
    return host.strip("[]"), int(port)


def lead(server: ServerConfig, beat: Callable[[], None]) -> Hosts:
    """Open the store, on rank 0. beat: called again and again. Raises ConfigError where the address cannot be had."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, port = rendezvous(server)
    try:
        _choose_interface(host, port)
        store = TCPStore(host, port, None, True, timedelta(seconds=_TRY_SECONDS), wait_for_workers=False)
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"--dist-init-addr {server.dist_init_addr}: {_first_line(error)}") from None
    logger.info("machine 0 of %d: the ranks of the others are expected at %s", server.nnodes, server.dist_init_addr)
    return Hosts(store, beat, beyond=server.tp_size)


def listen_for_hosts(
    hosts: Hosts, server: ServerConfig, context: zmq.Context[Any], inbox: Inbox[FromWorker], served: Served
) -> list[Outbox[ToWorker]]:
    """Rank 0's lines to the workers on other hosts, in the order of their ranks. served: what they are to load.

    Raises ConfigError where `--dist-init-addr` is no address of this machine.
    """
    hosts.store.set(_SERVED, msgspec.json.encode(served))
    try:
        own = address_of(*rendezvous(server)).host
        hosts.store.set(RANKS, inbox.also_at(own))
        lines: list[Outbox[ToWorker]] = []
        for rank in range(server.tp_size // server.nnodes, server.tp_size):
            line, address = Outbox[ToWorker].bound(context, own)
            hosts.store.set(worker_name(rank), address)
            lines.append(line)
    except (OSError, zmq.ZMQError) as error:
        raise ConfigError(f"--dist-init-addr {server.dist_init_addr}: no address of this machine: {error}") from None
    if is_loopback(own):
        logger.warning("%s is this machine's loopback: only ranks on this machine reach it", own)
    return lines


def follow(server: ServerConfig, beat: Callable[[], None]) -> Hosts:
    """Wait for rank 0's store, however long that takes, and count as joined. beat: called again and again."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, port = rendezvous(server)
    told = False
    while True:
        beat()
        try:
            _choose_interface(host, port)
            store = TCPStore(host, port, None, False, timedelta(seconds=_TRY_SECONDS))
            store.add(_JOINED, 1)
            return Hosts(store, beat)
        except (RuntimeError, OSError) as error:
            if not told:
                logger.info("waiting for machine 0 at %s (%s)", server.dist_init_addr, _first_line(error))
            told = True
            time.sleep(LOOK_SECONDS / 2)


def lines_to_rank_0(
    hosts: Hosts, rank: int, context: zmq.Context[Any], beat: Callable[[], None]
) -> tuple[Inbox[ToWorker], Outbox[FromWorker]]:
    """Those of a worker on another host. Raises GroupLostError."""
    name = worker_name(rank)
    addresses = []
    for key in (name, RANKS):
        while not _is_there(hosts, key):
            beat()
            time.sleep(0.05)
        addresses.append(hosts.store.get(key).decode())
    return Inbox.connected(context, addresses[0], name, ToWorker), Outbox.to(context, addresses[1])


def served_there(hosts: Hosts, config: RunConfig) -> RunConfig:
    """`config` with the weights that rank 0 begins with: it alone has noted the updates there have been. To be called
    when there are `lines_to_rank_0`. Raises GroupLostError."""
    if not _is_there(hosts, _SERVED):
        raise GroupLostError("rank 0 has not said what it serves")
    return with_served(config, msgspec.json.decode(hosts.store.get(_SERVED), type=Served))


def _is_there(hosts: Hosts, key: str) -> bool:
    try:
        return bool(hosts.store.check([key]))
    except RuntimeError as error:
        raise GroupLostError(f"rank 0's store does not answer: {_first_line(error)}") from None


def _choose_interface(host: str, port: int) -> None:
    from engine.kernels.carried import choose_interface

    choose_interface(host, port)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
