"""Rank 0 waits for the ranks of other machines, and sees when one of them begins anew."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from engine.kernels import carried
from engine.parallel.group import GroupLostError
from scheduler_proc import hosts as hosts_module
from scheduler_proc.hosts import Hosts

JOINED = "joined"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(hosts_module, "LOOK_SECONDS", 0.02)
    return TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=5), wait_for_workers=False)


def rank_0(store: Any, ranks: int, at_beat: Callable[[int], None]) -> Hosts:
    """at_beat: is told how many beats there have been."""
    beats = 0

    def beat() -> None:
        nonlocal beats
        beats += 1
        at_beat(beats)
        hosts.look()

    hosts = Hosts(store, beat, beyond=ranks)
    return hosts


def test_all_are_waited_for(store: Any) -> None:
    order = []

    def at_beat(beats: int) -> None:
        order.append(beats)
        if beats in (3, 5):
            store.add(JOINED, 1)

    rank_0(store, 3, at_beat).gather(2)
    assert order == [1, 2, 3, 4, 5]


def test_one_that_begins_anew_before_all_are_there(store: Any) -> None:
    """More have joined than there are."""
    store.add(JOINED, 1)
    hosts = rank_0(store, 3, lambda beats: store.add(JOINED, 2) if beats == 2 else None)  # type: ignore[arg-type]
    with pytest.raises(GroupLostError, match="a worker has begun anew"):
        hosts.gather(9)


def test_one_that_begins_anew_while_they_meet(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 does not sit out its patience."""
    over = threading.Event()
    monkeypatch.setattr(carried, "open_carried_exchange", lambda *_, **__: over.wait())
    store.add(JOINED, 1)
    hosts = rank_0(store, 2, lambda beats: store.add(JOINED, 1) if beats == 3 else None)  # type: ignore[arg-type]
    try:
        with pytest.raises(GroupLostError, match="a worker has begun anew"):
            hosts.exchange(0, 2, 64, 600.0)
    finally:
        over.set()


def test_what_goes_wrong_in_the_meeting_is_told(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any, **__: Any) -> None:
        raise GroupLostError("nobody came")

    monkeypatch.setattr(carried, "open_carried_exchange", lost)
    with pytest.raises(GroupLostError, match="nobody came"):
        rank_0(store, 2, lambda beats: None).exchange(0, 2, 64, 600.0)
