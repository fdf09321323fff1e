"""What a GPU does beside kernels: it keeps work as a graph, says when it has come to a point, and copies from and to
memory of the host that stays where it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class Event(Protocol):
    """A point in what is queued. One that was never recorded has been reached."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class Graph(Protocol):
    """Work that was captured, to be queued again in one launch, on the memory that it was captured with."""

    def replay(self) -> None: ...


class Machine(Protocol):
    @property
    def has_graphs(self) -> bool: ...

    def event(self) -> Event: ...

    def pinned(self, size: int) -> torch.Tensor:
        """uint8 [size], of the host: copies from and to it do not hold up who queues them."""
        ...

    def capture(self, work: Callable[[], None]) -> Graph:
        """What `work` queues, which is not carried out now. It may not wait for the device, nor copy from the host.

        Memory that it makes is the graph's, and of graphs captured before or later as well, where nothing holds it any
        more: what one replay leaves there another may overwrite.
        """
        ...


@dataclass(frozen=True, eq=False)
class CudaMachine:
    """The process's current GPU. shared: the memory that all graphs have in common, once there is one."""

    shared: list[Any] = field(default_factory=list)

    @property
    def has_graphs(self) -> bool:
        return True

    def event(self) -> Event:
        return torch.cuda.Event()

    def pinned(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Other threads of the process may use the GPU meanwhile."""
        if not self.shared:
            self.shared.append(torch.cuda.graph_pool_handle())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.shared[0], capture_error_mode="thread_local"):
            work()
        return graph


@dataclass(frozen=True)
class Reached:
    """The event of a machine that does at once what it is told."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@dataclass(frozen=True)
class HostMachine:
    """Where Triton's interpreter runs the kernels. It has no graphs."""

    @property
    def has_graphs(self) -> bool:
        return False

    def event(self) -> Event:
        return Reached()

    def pinned(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def capture(self, work: Callable[[], None]) -> Graph:
        raise RuntimeError("a processor has no graphs")


def open_machine(device: torch.device) -> Machine:
    return CudaMachine() if device.type == "cuda" else HostMachine()
