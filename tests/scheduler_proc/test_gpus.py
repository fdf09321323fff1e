"""Ranks with a GPU each: what they settle before they compute. Ranks are threads here, their sockets queues."""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from engine.config import ConfigError, ServerConfig
from engine.kernels import choice
from engine.wire.to_worker import Begin, FromWorker, Join, Measured, Meet, ToWorker
from scheduler_proc import gpus
from scheduler_proc.company import ALONE, Needs
from scheduler_proc.gpus import Gpus, open_group, open_on_gpu
from scheduler_proc.ranks import Ranks
from scheduler_proc.worker import Line

PATIENCE = 20.0


@dataclass
class Pipe:
    kind: Any
    messages: queue.SimpleQueue[bytes] = field(default_factory=queue.SimpleQueue)
    next: list[Any] = field(default_factory=list)

    def send(self, message: Any) -> None:
        self.messages.put(msgspec.msgpack.encode(message))

    def wait(self, seconds: float | None) -> bool:
        try:
            self.next.append(msgspec.msgpack.decode(self.messages.get(timeout=seconds), type=self.kind))
        except queue.Empty:
            return False
        return True

    def drain(self) -> list[Any]:
        found, self.next = self.next, []
        return found


def company(folder: Path) -> tuple[Ranks, Line]:
    """Of two ranks on one host."""
    told, answered = Pipe(ToWorker), Pipe(FromWorker)
    return Ranks([told], answered, folder, PATIENCE), Line(1, 2, told, answered)


def test_ranks_meet_anew_in_every_life(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    for _ in range(2):  # the second group finds in the runtime folder what the first one has left there
        first, second = company(tmp_path)
        with ThreadPoolExecutor(2) as pool:
            groups = list(pool.map(lambda one: one.meet("gloo"), (first, second)))
            assert [(group.rank, group.size) for group in groups] == [(0, 2), (1, 2)]
            sums = list(pool.map(lambda group: group.all_reduce(torch.ones(3)), groups))
        assert [one.tolist() for one in sums] == [[2.0] * 3] * 2


def test_the_pool_is_as_large_as_the_gpu_with_the_least_room_allows(tmp_path: Path) -> None:
    own, other = Needs(100, 10, 1000), Needs(400, 20, 900)

    def size(memory: Needs) -> int:
        return (memory.available - memory.weight_bytes) // memory.token_bytes

    for apart, wanted in ((True, (900 - 400) // 20), (False, (900 - 500) // 30)):
        ranks, line = company(tmp_path)
        line.outbox.send(Measured(1, other.weight_bytes, other.token_bytes, other.available))
        assert ranks.settle(own, size, apart=apart) == (wanted, Needs(500, 30, 900))
        assert line.only() == Begin(wanted)
    assert ALONE.settle(own, size, apart=True) == (90, own)


@pytest.mark.parametrize(
    ("told", "device", "theirs"), [(Join(None, 64, 1.0), "cuda", "cpu"), (Meet(None, 1.0), "cpu", "cuda")]
)
def test_machines_that_disagree_say_so(tmp_path: Path, told: Join | Meet, device: str, theirs: str) -> None:
    ranks, line = company(tmp_path)
    ranks.tell(told)
    with pytest.raises(ConfigError, match=f"--device is '{device}' for rank 1, and '{theirs}' for rank 0"):
        line.meet("gloo") if device == "cuda" else line.join(64)


def test_a_torch_without_nccl_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(ConfigError, match="--tp-size is 2, and --device cuda: this build of torch has no NCCL"):
        open_group(0, 2, str(tmp_path / "store"), None, "nccl", 1.0)


def test_each_rank_opens_its_backend_on_the_gpu_that_it_has_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has taken that before it meets the others, who are met on the current device."""
    order: list[Any] = []

    @dataclass(frozen=True)
    class Company:
        place: tuple[int, int] = (1, 2)

        def meet(self, carrier: str) -> str:
            order.append(carrier)
            return "the group"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", order.append)
    monkeypatch.setattr(gpus, "open_gpu", lambda *given: given)
    assert gpus.take_gpu is choice.take_gpu
    server, place = ServerConfig(device="cuda", tp_size=2, base_gpu_id=4), torch.device("cuda", 5)
    assert open_on_gpu(server, Company(), Gpus()) == (place, "the group")  # type: ignore[arg-type]
    assert order == [place, "nccl"]
