"""Ranks on CPUs as a group: what they say goes through an exchange of csrc, shared memory or what carries it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from engine.kernels import _cpu
from engine.parallel.group import GroupLostError

_HEAD_LENGTH = 4


@dataclass(frozen=True, eq=False)
class ExchangeGroup:
    """See `engine.parallel.group.Group`."""

    exchange: _cpu.Exchange

    @property
    def rank(self) -> int:
        return self.exchange.rank

    @property
    def size(self) -> int:
        return self.exchange.ranks

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        values = x.to(torch.float32, copy=True).contiguous()
        with lost():
            self.exchange.all_reduce(values.numpy().reshape(-1))
        return values.to(x.dtype)

    def gather(self, x: torch.Tensor) -> list[torch.Tensor] | None:
        with lost():
            found = self.exchange.gather(_packed(x))
        return [_unpacked(one) for one in found] if self.rank == 0 else None


@contextmanager
def lost() -> Iterator[None]:
    """What an exchange raises, as every group does."""
    try:
        yield
    except _cpu.ExchangeError as error:
        raise GroupLostError(str(error)) from None


def _packed(x: torch.Tensor) -> bytes:
    """Shape and dtype as JSON, its length before it; then the elements."""
    array = x.contiguous().numpy()
    head = json.dumps([array.dtype.str, array.shape]).encode()
    return len(head).to_bytes(_HEAD_LENGTH, "little") + head + array.tobytes()


def _unpacked(data: bytes) -> torch.Tensor:
    end = _HEAD_LENGTH + int.from_bytes(data[:_HEAD_LENGTH], "little")
    dtype, shape = json.loads(data[_HEAD_LENGTH:end])
    return torch.from_numpy(np.frombuffer(data, dtype, offset=end).reshape(shape).copy())
