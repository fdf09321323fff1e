"""A rank on a GPU of its own, and the group of those that a model is divided among."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from engine.config import ConfigError, ServerConfig
from engine.kernels.choice import open_gpu, take_gpu
from engine.kernels.table import Backend
from engine.parallel.group import DeviceGroup
from scheduler_proc.company import Company
from scheduler_proc.hosts import Hosts

if TYPE_CHECKING:
    from engine.parallel.distributed import Carrier

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Gpus:
    """What `--device cuda` means to a process. kind: of its device; "cpu" stands in for a GPU where there is none:
    Triton's interpreter runs the kernels. carrier: of what ranks say to one another."""

    kind: Literal["cuda", "cpu"] = "cuda"
    carrier: Carrier = "nccl"


GPUS = Gpus()


def open_on_gpu(server: ServerConfig, company: Company, gpus: Gpus) -> Backend:
    """The backend of this rank on its GPU, once it has met the others. Raises ConfigError and GroupLostError."""
    device = torch.device("cpu") if gpus.kind == "cpu" else take_gpu(server.base_gpu_id, company.place)
    logger.debug("rank %d of this machine's %d computes on %s", *company.place, device)
    return open_gpu(device, company.meet(gpus.carrier))


def new_store(folder: Path) -> str:
    """The path of a file, for the store of one group; another group, after a death, gets another one. It goes with
    the runtime folder."""
    return str(Path(tempfile.mkdtemp(prefix="group-", dir=folder)) / "store")


def open_group(
    rank: int, size: int, path: str | None, hosts: Hosts | None, carrier: Carrier, patience: float
) -> DeviceGroup:
    """Meet the other ranks, in the file `path` or where the hosts meet. patience: seconds for the meeting, and later
    for a rank that stays away. Raises ConfigError where torch lacks the carrier, and GroupLostError.
    """
    from torch.distributed import FileStore, PrefixStore  # type: ignore[attr-defined]

    from engine.parallel.distributed import NoCarrierError, open_distributed

    store: Any
    if path is not None:
        store = FileStore(path, size)
    else:
        assert hosts is not None, "ranks on one host are told of a file"
        store = PrefixStore("group", hosts.store)
    try:
        return open_distributed(rank, size, store, carrier, patience)
    except NoCarrierError as error:
        raise ConfigError(f"--tp-size is {size}, and --device cuda: {error}") from None
