"""Rank 0 of a divided model, the only one that decides: what it tells the other ranks, and what it hears from them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import zmq

from engine.config import ConfigError, ModelSource, RunConfig
from engine.config.run import Served
from engine.parallel.group import DeviceGroup
from engine.wire.board import BEATS, Heart
from engine.wire.sockets import Inbox, Outbox, Receiver, Sender
from engine.wire.to_worker import (
    RANKS,
    Begin,
    FromWorker,
    HeldPart,
    Join,
    Joined,
    Loaded,
    Measured,
    Meet,
    ReadPart,
    Recorded,
    RecordPart,
    Replaced,
    ReplaceWeights,
    RevertWeights,
    ToWorker,
    worker_name,
)
from scheduler_proc.company import Needs
from scheduler_proc.gpus import new_store, open_group
from scheduler_proc.hosts import Hosts, lead, listen_for_hosts

if TYPE_CHECKING:
    from engine.kernels._cpu import Exchange
    from engine.parallel.distributed import Carrier

logger = logging.getLogger(__name__)

PATIENCE_MARGIN = 30.0
"""Seconds that ranks wait for one another beyond those after which the launcher replaces a process that hangs."""

A = TypeVar("A", bound=Joined | Measured | Loaded | Replaced | HeldPart | Recorded)


@dataclass(slots=True)
class Ranks:
    """Rank 0's line to the others. beat: called while it waits, as a sign of life. hosts: where they are on several,
    with `ranks_each` each.

    Nothing here has a time limit: a worker that dies or hangs is found by the launcher, which ends this process too.
    """

    workers: list[Sender[ToWorker]]
    inbox: Receiver[FromWorker]
    folder: Path
    patience: float
    beat: Callable[[], None] = lambda: None
    hosts: Hosts | None = None
    ranks_each: int = 0
    _heard: list[FromWorker] = field(default_factory=list)
    _sending: threading.Lock = field(default_factory=threading.Lock)
    _asking: threading.Lock = field(default_factory=threading.Lock)

    @property
    def size(self) -> int:
        return 1 + len(self.workers)

    def tell(self, message: ToWorker) -> None:
        with self._sending:  # an update of the weights has a thread of its own
            for worker in self.workers:
                worker.send(message)

    def ask(self, message: ToWorker, kind: type[A], meanwhile: Callable[[], None] = lambda: None) -> list[A]:
        """All workers' answers, in the order of their ranks. meanwhile: what this rank does before it waits for them;
        what it raises is raised when all have answered."""
        with self._question():
            self.tell(message)
            failure: Exception | None = None
            try:
                meanwhile()
            except Exception as error:
                failure = error
            answers = self._hear(kind)
            if failure is not None:
                raise failure
            return answers

    def _hear(self, kind: type[A]) -> list[A]:
        found: dict[int, A] = {}
        while True:
            # A quick worker may tell what is asked next while a slow one has not answered yet.
            found |= {answer.rank: answer for answer in self._heard if isinstance(answer, kind)}
            self._heard = [answer for answer in self._heard if not isinstance(answer, kind)]
            if len(found) == len(self.workers):
                return [found[rank] for rank in sorted(found)]
            self._beat()
            if self.inbox.wait(BEATS):
                self._heard += self.inbox.drain()

    @contextmanager
    def _question(self) -> Iterator[None]:
        while not self._asking.acquire(timeout=BEATS):
            self._beat()
        try:
            yield
        finally:
            self._asking.release()

    def _beat(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.beat()

    # While the model is loaded: `scheduler_proc.company.Company`.

    @property
    def place(self) -> tuple[int, int]:
        return 0, self.ranks_each or self.size

    def join(self, part: int) -> Exchange:
        if self.hosts is not None:
            return self._join_hosts(self.hosts, part)
        try:
            from engine.kernels.shared_memory import make_exchange
        except ImportError as error:
            raise ConfigError(
                f"--tp-size {self.size}: needs the compiled kernels, which are not installed: {error}"
            ) from None
        exchange, memory = make_exchange(self.size, part, self.patience, self.folder)
        try:
            self.ask(Join(memory.path, part, self.patience), Joined)
        finally:
            memory.forget()
        return exchange

    def _join_hosts(self, hosts: Hosts, part: int) -> Exchange:
        hosts.gather(self.size - 1)  # who is told to join waits for all others, and not for long
        found: list[Exchange] = []
        self.ask(
            Join(None, part, self.patience), Joined,
            lambda: found.append(hosts.exchange(0, self.size, part, self.patience)),
        )  # fmt: skip
        return found[0]

    def meet(self, carrier: Carrier) -> DeviceGroup:
        found: list[DeviceGroup] = []
        path = new_store(self.folder) if self.hosts is None else None
        if self.hosts is not None:
            self.hosts.gather(self.size - 1)
        self.ask(
            Meet(path, self.patience), Joined,
            lambda: found.append(open_group(0, self.size, path, self.hosts, carrier, self.patience)),
        )  # fmt: skip
        return found[0]

    def settle(self, own: Needs, size: Callable[[Needs], int], *, apart: bool = False) -> tuple[int, Needs]:
        with self._question():
            others = self._hear(Measured)
        every = [own, *(Needs(other.weight_bytes, other.token_bytes, other.available) for other in others)]
        each = 1 if apart else self.place[1]
        memories = [together(every[start : start + each]) for start in range(0, len(every), each)]
        slots = min(size(memory) for memory in memories)
        self.tell(Begin(slots))
        return slots, together(every)

    def loaded(self) -> None:
        """Wait until all have read their weights."""
        with self._question():
            self._hear(Loaded)

    # While it serves.

    def replace(self, source: ModelSource, own: Callable[[], None]) -> list[Replaced]:
        """Every rank overwrites its weights, this one by `own`, whose error is raised when all have answered."""
        return self.ask(ReplaceWeights(source), Replaced, own)

    def revert(self, reason: str) -> None:
        """Every other rank takes its weights before the last `replace` back, if it has new ones."""
        self.ask(RevertWeights(reason), Replaced)

    def whole_rows(self, name: str, count: int, own: HeldPart, width: int | None) -> torch.Tensor:
        """The first `count` rows of a tensor, of which each rank holds a part. width: its columns; None: a vector."""
        return put_together([own, *self.ask(ReadPart(name, count), HeldPart)], count, width)

    def record(self, action: Any) -> str | None:
        """The others' records of experts. Returns why one of them could not do it."""
        return next((told.error for told in self.ask(RecordPart(action), Recorded) if told.error is not None), None)


def together(ranks: list[Needs]) -> Needs:
    return Needs(
        sum(one.weight_bytes for one in ranks),
        sum(one.token_bytes for one in ranks),
        min(one.available for one in ranks),
    )


def put_together(parts: list[HeldPart], count: int, width: int | None) -> torch.Tensor:
    """The first `count` rows from all ranks' parts, in the order of the ranks: parts of the rows, which may overlap,
    or of the columns of all rows."""
    held = [
        (part.start, torch.from_numpy(np.frombuffer(part.values, np.float32).reshape(part.shape).copy()))
        for part in parts
    ]
    held = [(start, rows) for start, rows in held if rows.numel()]
    if width is not None and held and all(rows.shape[1] < width for _, rows in held):
        return torch.cat([rows for _, rows in held], 1)
    total = min(count, max((start + len(rows) for start, rows in held), default=0))
    whole = torch.empty((total, *held[0][1].shape[1:]) if held else (0,))
    for start, rows in held:
        whole[start : start + len(rows)] = rows[: total - start]
    return whole


def open_ranks(context: zmq.Context[Any], config: RunConfig, served: Served, heart: Heart) -> Ranks:
    """Rank 0's lines to all others. served: what those on other machines are to load.

    Raises ConfigError where `--dist-init-addr` cannot be had.
    """
    server, runtime_dir = config.server, config.runtime_dir
    inbox: Inbox[FromWorker] = Inbox(context, runtime_dir, RANKS, FromWorker)
    each = server.tp_size // server.nnodes
    workers: list[Sender[ToWorker]] = [Outbox(context, runtime_dir, worker_name(rank)) for rank in range(1, each)]
    hosts = None
    if server.nnodes > 1:
        hosts = lead(server, heart.beat)
        workers += listen_for_hosts(hosts, server, context, inbox, served)
        heart.also = hosts.look
    patience = server.watchdog_timeout + PATIENCE_MARGIN
    return Ranks(workers, inbox, Path(runtime_dir), patience, heart.beat, hosts, each)
