"""The lines between the ranks of several machines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from engine.config import ConfigError, ServerConfig
from engine.config.run import Served
from engine.wire.operation import Tune
from engine.wire.sockets import Inbox, Outbox
from scheduler_proc.hosts import Hosts, listen_for_hosts, rendezvous


def test_rendezvous() -> None:
    for address, wanted in (("[::1]:5000", "::1"), ("10.0.0.1:5000", "10.0.0.1"), ("machine0:5000", "machine0")):
        assert rendezvous(ServerConfig(dist_init_addr=address)) == (wanted, 5000)


class Kept:
    """In place of the store."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def set(self, key: str, value: Any) -> None:
        self.values[key] = value


@pytest.fixture
def context() -> Iterator[Any]:
    made: zmq.Context[Any] = zmq.Context()
    yield made
    made.destroy(linger=0)


def lines(context: Any, address: str, folder: Path) -> tuple[list[Any], dict[str, Any]]:
    """Rank 0's end of them, and what it says of them in the store."""
    store = Kept()
    server = ServerConfig(tp_size=2, nnodes=2, dist_init_addr=address)
    inbox: Inbox[Any] = Inbox(context, str(folder), "ranks", Tune)
    served = Served(source=None, weight_version="7")
    return [inbox, *listen_for_hosts(Hosts(store, lambda: None), server, context, inbox, served)], store.values


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_lines_between_hosts_carry_messages_both_ways(host: str, context: Any, tmp_path: Path) -> None:
    (ranks, to_worker), said = lines(context, f"{host}:5000", tmp_path)
    assert said["ranks"].startswith(f"tcp://{host}:") and said["worker1"].startswith(f"tcp://{host}:")
    worker: Inbox[Tune] = Inbox.connected(context, said["worker1"], "worker1", Tune)
    to_ranks: Outbox[Tune] = Outbox.to(context, said["ranks"])
    for outbox, inbox in ((to_worker, worker), (to_ranks, ranks)):
        outbox.send(Tune(log_level="debug"))
        assert inbox.wait(20)
        assert inbox.drain() == [Tune(log_level="debug")]


def test_an_address_of_another_machine_is_refused(context: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--dist-init-addr 192\.0\.2\.7:5000: no address of this machine"):
        lines(context, "192.0.2.7:5000", tmp_path)
