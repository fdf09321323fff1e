"""Ranks with a GPU each as a group, over NCCL; gloo carries the same calls between processes without one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as library

from engine.parallel.group import GroupLostError, in_order

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store  # torch.distributed.Store, which its stubs do not export

Carrier = Literal["nccl", "gloo"]

MOST_DIMENSIONS = 6
LOOK_SECONDS = 2e-5
"""Between two looks whether the others have said something."""
_DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool,
)  # fmt: skip


class NoCarrierError(RuntimeError):
    """torch was built without what is to carry the group."""


@dataclass(frozen=True, eq=False)
class DistributedGroup:
    """See `engine.parallel.group.DeviceGroup`. Results are on `device`, where what is said lies or is moved to.

    carried: a process group of the library's, which knows nothing of the process's default one. patience: how long a
    call waits for the others.

    A sum gathers all ranks' x everywhere and adds them up there: a ring adds in an order that depends on the size of
    x and on where in it an entry lies. Of n ranks each receives (n - 1) x bytes; with a ring it were 2 (n - 1) / n.
    For 2 ranks that is the same, for 4 twice and for 8 four times as many.

    With NCCL all but `gather` is only queued, as the rest of a step is. A rank that is gone shows to whoever waits for
    the device: to `gather` after `patience`, which must be longer than a step, and to others never, so that the
    launcher, who sees it go, has to end them.
    """

    rank: int
    size: int
    device: torch.device
    carried: Any
    patience: timedelta

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return in_order(list(self.all_gather(x))) if x.numel() else x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        with lost(self):
            return self._all(x.to(self.device).contiguous(), waits=self.device.type == "cpu")

    def gather(self, x: torch.Tensor) -> list[torch.Tensor] | None:
        """Shapes and dtypes first, from all to all, then the elements to rank 0, padded to the most bytes. Waits."""
        here = x.to(self.device).contiguous()
        head = torch.tensor(_head(here), dtype=torch.int64).to(self.device)
        with lost(self):
            heads: list[list[int]] = self._all(head, waits=True).tolist()
            kinds = [_kind(one) for one in heads]
            lengths = [dtype.itemsize * torch.Size(shape).numel() for dtype, shape in kinds]
            found = self._to_first(_bytes(here), max(lengths)) if max(lengths) else []
        if self.rank:
            return None
        if not found:
            return [torch.empty(shape, dtype=dtype, device=self.device) for dtype, shape in kinds]
        cut = zip(found, lengths, kinds, strict=True)
        return [data[:length].view(dtype).view(shape) for data, length, (dtype, shape) in cut]

    def close(self) -> None:
        """Ends what carries it; what others still wait for raises there."""
        self.carried.shutdown()

    def _all(self, x: torch.Tensor, *, waits: bool) -> torch.Tensor:
        """x of all ranks, [size, *x.shape]; as bytes, since gloo does not know every dtype."""
        out = torch.empty((self.size, *x.shape), dtype=x.dtype, device=self.device)
        self._finish(self.carried._allgather_base(_bytes(out), _bytes(x)), waits=waits)
        return out

    def _to_first(self, data: torch.Tensor, length: int) -> list[torch.Tensor]:
        """On rank 0 the `length` bytes of each; all other ranks get none."""
        padded = torch.zeros(length, dtype=torch.uint8, device=self.device)
        padded[: len(data)] = data
        out = [torch.empty_like(padded) for _ in range(self.size)] if self.rank == 0 else []
        self._finish(self.carried.gather([out] if out else [], [padded], _to_rank_0()), waits=True)
        return out

    def _finish(self, work: Any, *, waits: bool) -> None:
        """Without `waits` the stream waits, not the process.

        The process looks itself whether it is done: the library's own wait with a limit sleeps a millisecond between
        two looks on a GPU, and a step has several.
        """
        until = time.monotonic() + self.patience.total_seconds()
        while waits and not work.is_completed():
            if time.monotonic() > until:
                raise GroupLostError(f"rank {self.rank} of {self.size}: what the others say has not come")
            time.sleep(LOOK_SECONDS)
        work.wait()  # raises what went wrong


def open_distributed(
    rank: int, size: int, store: Store, backend: Carrier = "nccl", patience: float = 60.0
) -> DistributedGroup:
    """The group of the ranks 0 to size - 1 that call this with stores of the same contents. All make it before any
    goes on; `patience` is in seconds and for this, too.

    "nccl": on the process's current GPU. Several groups in one store need prefixes (torch.distributed.PrefixStore).

    Raises ValueError for a rank or a number of ranks that cannot be, NoCarrierError where torch lacks the backend,
    and GroupLostError where not all come.
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank is {rank}; allowed: 0 to {size - 1}, as there are {size} ranks")
    wait = timedelta(seconds=patience)
    store.set_timeout(wait)
    if backend == "gloo":
        device, open_carrier = torch.device("cpu"), _open_gloo
    elif library.is_nccl_available():
        device, open_carrier = torch.device("cuda", torch.cuda.current_device()), _open_nccl
    else:
        raise NoCarrierError("this build of torch has no NCCL")
    try:
        carried = open_carrier(store, rank, size, wait)
    except RuntimeError as error:
        raise GroupLostError(f"rank {rank} of {size}: {error}") from None
    group = DistributedGroup(rank, size, device, carried, wait)
    group.gather(torch.zeros(1, dtype=torch.uint8))
    return group


@contextmanager
def lost(group: DistributedGroup) -> Iterator[None]:
    """What the library raises, as every group does. Memory that runs out is no rank that is lost."""
    try:
        yield
    except (GroupLostError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        raise GroupLostError(f"rank {group.rank} of {group.size}: {error}") from None


def _open_gloo(store: Store, rank: int, size: int, wait: timedelta) -> Any:
    return library.ProcessGroupGloo(store, rank, size, wait)


def _open_nccl(store: Store, rank: int, size: int, wait: timedelta) -> Any:
    """The library's own watch ends the process, so it gets twice the time that a call has to end with an error."""
    carrier = library.ProcessGroupNCCL
    options = carrier.Options()
    options._timeout = 2 * wait
    return carrier(store, rank, size, options)


def _to_rank_0() -> Any:
    options = library.GatherOptions()
    options.rootRank = 0
    return options


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1).view(torch.uint8)


def _head(x: torch.Tensor) -> list[int]:
    """dtype, dimensions and shape as so many numbers, whatever the tensor."""
    if x.dtype not in _DTYPES or x.dim() > MOST_DIMENSIONS:
        raise ValueError(f"a {x.dtype} of {x.dim()} dimensions is gathered; allowed: {MOST_DIMENSIONS}, of {_DTYPES}")
    return [_DTYPES.index(x.dtype), x.dim(), *x.shape, *[0] * (MOST_DIMENSIONS - x.dim())]


def _kind(head: list[int]) -> tuple[torch.dtype, list[int]]:
    return _DTYPES[head[0]], head[2 : 2 + head[1]]
