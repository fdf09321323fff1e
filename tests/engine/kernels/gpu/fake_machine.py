"""A GPU's graphs, events and pinned memory, played on the CPU, strictly: it notes the order of all that happens.

What is captured is noted op by op and launch by launch. A replay does the same ops on the same tensors again. Nothing
else comes back from the capture, since all that was computed in it is overwritten; and so is what other graphs left, as
they share their memory on a GPU. In a capture it refuses what a GPU refuses: waiting, and what comes from the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.kernels.gpu.launch import Call
from engine.kernels.gpu.machine import Event, Graph, Machine

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.is_nonzero.default, aten.equal.default,
    aten.lift_fresh.default, aten.masked_select.default, aten._unique2.default,
}  # fmt: skip

EMPTY = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default}
"""What they give stays spoilt until it is written."""


class CaptureError(AssertionError):
    """What a GPU would refuse in a capture."""


def tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass(frozen=True, eq=False)
class Done:
    """An op with what it was given and what it made, or a launch."""

    op: Any
    args: Any
    kwargs: Any
    made: Any


@dataclass(eq=False)
class FakeEvent:
    machine: FakeMachine
    name: str

    def record(self) -> None:
        self.machine.log.append(("record", self.name))

    def synchronize(self) -> None:
        self.machine.log.append(("wait", self.name))


@dataclass(eq=False)
class FakeGraph:
    machine: FakeMachine
    number: int
    steps: list[Done]

    def spoil(self) -> None:
        for step in self.steps:
            for tensor in tensors(step.made):
                if storage(tensor) in self.machine.own[self.number]:
                    tensor.fill_(float("nan") if tensor.is_floating_point() else 101)

    def replay(self) -> None:
        self.machine.log.append(("replay", self.number))
        self.machine.replaying = True
        for other in self.machine.graphs:
            if other is not self:
                other.spoil()
        for step in self.steps:
            if isinstance(step.op, Call):
                step.op.run()
                continue
            if step.op in EMPTY:
                continue
            for old, new in zip(tensors(step.made), tensors(step.op(*step.args, **step.kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        self.machine.replaying = False


@dataclass(eq=False)
class FakeMachine:
    """log: ("event", name), ("pinned", size), ("capture", n), ("replay", n), ("record", event), ("wait", event), and
    ("launch", kernel) outside of graphs. room: captures after so many run out of memory."""

    log: list[tuple[str, Any]] = field(default_factory=list)
    graphs: list[FakeGraph] = field(default_factory=list)
    own: list[set[int]] = field(default_factory=list)
    room: int = 1000
    noting: Noting | None = None
    known: dict[int, torch.Tensor] = field(default_factory=dict)
    events: int = 0
    replaying: bool = False

    @property
    def has_graphs(self) -> bool:
        return True

    def event(self) -> Event:
        self.events += 1
        return FakeEvent(self, f"event {self.events}")

    def pinned(self, size: int) -> torch.Tensor:
        self.log.append(("pinned", size))
        return torch.full((size,), 0xEE, dtype=torch.uint8)

    def capture(self, work: Callable[[], None]) -> Graph:
        assert self.noting is not None, "a capture that is not watched"
        number = len(self.graphs)
        self.log.append(("capture", number))
        self.noting.steps, self.noting.made = [], set()
        work()
        if len(self.graphs) >= self.room:
            self.noting.steps = None
            raise torch.OutOfMemoryError("CUDA out of memory")
        graph = FakeGraph(self, number, self.noting.steps)
        self.own.append(self.noting.made)
        self.graphs.append(graph)
        self.noting.steps = None
        graph.spoil()
        return graph

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Captures are made in here, after what they need was used once."""
        self.noting = Noting(self)
        with self.noting:
            yield
        self.noting = None
        self.known.clear()

    def launched(self, call: Call, run: Callable[[Call], None]) -> None:
        """In the place of `Call.run`."""
        if self.noting is None:
            if not self.replaying:
                self.log.append(("launch", call.name))
            run(call)
            return
        self.noting.note(Done(call, (), call.arguments, ()))
        with self.noting.aside():
            run(call)


@dataclass(frozen=True, eq=False)
class NotedGroup:
    """A group whose calls are queued on the machine: each is one op of a capture, whatever it does within."""

    inner: Any
    machine: FakeMachine

    @property
    def rank(self) -> int:
        return int(self.inner.rank)

    @property
    def size(self) -> int:
        return int(self.inner.size)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self._noted(self.inner.all_reduce, x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self._noted(self.inner.all_gather, x)

    def gather(self, x: torch.Tensor) -> list[torch.Tensor] | None:
        raise CaptureError("a gather waits for the device")

    def _noted(self, op: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        noting = self.machine.noting
        if noting is None:
            return op(x)
        with noting.aside():
            made = op(x)
        noting.note(Done(op, (x,), {}, made))
        return made


def watched(machine: Machine) -> AbstractContextManager[None]:
    return machine.watched() if isinstance(machine, FakeMachine) else nullcontext()


class Noting(TorchDispatchMode):
    """steps: of the capture that goes on, if one does. made: the storages of what was made in it."""

    def __init__(self, machine: FakeMachine) -> None:
        super().__init__()
        self.machine = machine
        self.steps: list[Done] | None = None
        self.made: set[int] = set()
        self.within_launch = False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What the interpreter does itself is none of the program's ops."""
        self.within_launch = True
        yield
        self.within_launch = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.within_launch:
            return func(*args, **kwargs)
        if self.steps is not None and func in WAITING:
            raise CaptureError(f"{func} in a capture")
        made = func(*args, **kwargs)
        self.note(Done(func, args, kwargs, made))
        return made

    def note(self, step: Done) -> None:
        given, made = tensors((step.args, step.kwargs)), tensors(step.made)
        if self.steps is None:
            self.machine.known |= {storage(tensor): tensor for tensor in given + made}
            return
        for tensor in given:
            if tensor.numel() and storage(tensor) not in self.machine.known and storage(tensor) not in self.made:
                raise CaptureError(f"{step.op} is given a tensor that comes from the host: {tensor}")
        held = {storage(tensor) for tensor in given}
        self.made |= {storage(tensor) for tensor in made} - held
        self.steps.append(step)
