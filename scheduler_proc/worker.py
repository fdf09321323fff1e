"""A rank above 0: it holds its part of the model, and does what rank 0 tells it, until it is ended.

It decides nothing. What goes wrong here ends the process, and with it the group: the others cannot go on without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.config import ConfigError
from engine.kernels.batch import RaggedBatch, offsets
from engine.kernels.queued import QueueingProgram
from engine.kernels.table import Longs, Program
from engine.parallel.group import DeviceGroup
from engine.wire.board import BEATS
from engine.wire.operation import Tune
from engine.wire.sockets import Receiver, Sender
from engine.wire.to_worker import (
    Begin,
    FromWorker,
    Join,
    Joined,
    Measured,
    Meet,
    ReadPart,
    Recorded,
    RecordPart,
    Replaced,
    ReplaceWeights,
    RevertWeights,
    RunHead,
    RunStep,
    ToWorker,
)
from engine.wire.tuning import tune
from scheduler_proc.company import Needs
from scheduler_proc.gpus import open_group
from scheduler_proc.hosts import Hosts
from scheduler_proc.recorder import Recorder, obey
from scheduler_proc.weights import RefusedUpdateError, Weights

if TYPE_CHECKING:
    from engine.kernels._cpu import Exchange
    from engine.parallel.distributed import Carrier

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Line:
    """A worker's line to rank 0. beat: called while it waits, as a sign of life. size: of the group. hosts: where it is
    on several, with `ranks_each` each."""

    rank: int
    size: int
    inbox: Receiver[ToWorker]
    outbox: Sender[FromWorker]
    beat: Callable[[], None] = lambda: None
    hosts: Hosts | None = None
    ranks_each: int = 0

    @property
    def place(self) -> tuple[int, int]:
        each = self.ranks_each or self.size
        return self.rank % each, each

    def wait(self) -> list[ToWorker]:
        """What has come; something has."""
        while True:
            self.beat()
            if messages := self.inbox.drain():
                return messages
            self.inbox.wait(BEATS)

    def only(self) -> ToWorker:
        """The one message that rank 0 sends before it waits for an answer."""
        (message,) = self.wait()
        return message

    # `scheduler_proc.company.Company`.

    def join(self, part: int) -> Exchange:
        message = self._asked_to("cpu")
        assert isinstance(message, Join)
        try:
            from engine.kernels.shared_memory import join_exchange

            if message.path is None:
                assert self.hosts is not None
                exchange: Exchange = self.hosts.exchange(self.rank, self.size, message.part_bytes, message.patience)
            else:
                exchange = join_exchange(message.path, self.rank, self.size, message.part_bytes, message.patience)
        except (ImportError, OSError) as error:
            raise ConfigError(f"--tp-size {self.size}: rank {self.rank} cannot join the others: {error}") from None
        self.outbox.send(Joined(self.rank))
        return exchange

    def meet(self, carrier: Carrier) -> DeviceGroup:
        message = self._asked_to("cuda")
        assert isinstance(message, Meet)
        group = open_group(self.rank, self.size, message.path, self.hosts, carrier, message.patience)
        self.outbox.send(Joined(self.rank))
        return group

    def _asked_to(self, device: str) -> Join | Meet:
        """Rank 0's first message. Raises ConfigError where it computes on another device than this rank."""
        message = self.only()
        assert isinstance(message, Join | Meet), message
        theirs = "cuda" if isinstance(message, Meet) else "cpu"
        if theirs != device:
            raise ConfigError(
                f"--device is {device!r} for rank {self.rank}, and {theirs!r} for rank 0; all machines need the same"
            )
        return message

    def settle(self, own: Needs, size: Callable[[Needs], int], *, apart: bool = False) -> tuple[int, Needs]:
        self.outbox.send(Measured(self.rank, own.weight_bytes, own.token_bytes, own.available))
        message = self.only()
        assert isinstance(message, Begin), message
        return message.slots, own


@dataclass(slots=True)
class Worker:
    line: Line
    program: Program
    weights: Weights
    recorder: Recorder | None = None

    def loop(self) -> None:
        """Obey until the process is ended. Raises what goes wrong."""
        while True:
            for message in self.line.wait():
                self.obey(message)

    def obey(self, message: ToWorker) -> None:
        match message:
            case RunStep():
                batch = ragged_batch(message)
                if message.sources is None:
                    self.program.run(batch, _longs(message.rows), _keep(message.keep))
                else:
                    assert isinstance(self.program, QueueingProgram), "rank 0 queues a step, and this rank cannot"
                    self.program.queue(batch, _longs(message.rows), _longs(message.sources), None, None)
                if self.recorder is not None:
                    self.recorder.note(batch, self.program.routing)
            case RunHead(rows, keep):
                self.program.logits(_longs(rows), _keep(keep))
            case Tune():
                tune(message)
            case ReplaceWeights(source):
                try:
                    self.weights.replace(self.weights.opened(source))
                    self._answer(Replaced(self.line.rank))
                except RefusedUpdateError as error:
                    self._answer(Replaced(self.line.rank, str(error)))
            case RevertWeights(reason):
                self.weights.revert(RuntimeError(reason))
                self._answer(Replaced(self.line.rank))
            case ReadPart(name, rows):
                self._answer(self.weights.held_part(name, rows, self.line.rank))
            case RecordPart(action):
                self._answer(Recorded(self.line.rank, obey(self.recorder, action, self.line.rank)))
            case Join() | Meet() | Begin():
                raise AssertionError(f"{message} comes while the model is loaded, and now it serves")

    def _answer(self, message: FromWorker) -> None:
        self.line.outbox.send(message)


def ragged_batch(step: RunStep) -> RaggedBatch:
    lengths = tuple(step.context_lengths)
    return RaggedBatch(
        token_ids=_tensor(step.token_ids),
        positions=_tensor(step.positions),
        slots=_tensor(step.slots),
        query_starts=tuple(step.query_starts),
        context_lengths=lengths,
        context_slots=_tensor(step.context_slots),
        context_starts=offsets(lengths),
        type_ids=None if step.type_ids is None else _tensor(step.type_ids),
    )


def _longs(values: bytes) -> Longs:
    return np.frombuffer(values, np.int64).copy()  # what torch and the kernels take may be written to


def _tensor(values: bytes) -> torch.Tensor:
    return torch.from_numpy(_longs(values))


def _keep(values: bytes | None) -> Longs | None:
    return None if values is None else _longs(values)
