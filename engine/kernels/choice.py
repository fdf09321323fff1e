"""Which backend serves: on a CPU the kernels of the best instruction set that this machine has, unless told otherwise;
on GPUs that of the rank's own one."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import torch

from engine.config import ConfigError
from engine.config.environment import setting
from engine.kernels.cores import physical_cores, share_of
from engine.kernels.eager import EagerBackend
from engine.kernels.table import Backend
from engine.parallel.group import ALONE, DeviceGroup

if TYPE_CHECKING:
    from engine.kernels._cpu import Exchange

logger = logging.getLogger(__name__)

REFERENCE = "reference"


def open_backend(
    isa: str,
    threads: int | None,
    exchange: Exchange | None = None,
    place: tuple[int, int] = (0, 1),
) -> Backend:
    """The backend on a CPU for `--cpu-isa` and `--cpu-threads`.

    isa: "auto" asks the environment (TOKENMILL_CPU_ISA), then the processor. threads: None: one for each physical core
    that this process may use. exchange: with the other ranks, if there are any: this one, number place[0] of place[1]
    on this host, then has its share of the threads, and this thread and those it starts keep to its share of the
    cores. Raises ConfigError, naming what there is, for an ISA that this machine cannot run.
    """
    cores = physical_cores()
    count = threads or len(cores)
    if exchange is not None:
        cores, count = share_of(cores, count, *place)
        _keep_to(cores)
    wanted = isa if isa != "auto" else setting("CPU_ISA") or "auto"
    if wanted == REFERENCE:
        return _reference(count, exchange)
    try:
        from engine.kernels import _cpu
    except ImportError as error:
        if wanted != "auto":
            raise ConfigError(f"--cpu-isa {wanted}: the kernels are not installed ({error})") from None
        logger.warning("Serving with the slow reference kernels: the compiled ones are not installed (%s)", error)
        return _reference(count, exchange)
    usable = _cpu.usable_isas()
    if wanted == "auto":
        if not usable:
            logger.warning("Serving with the slow reference kernels: this processor has no AVX2")
            return _reference(count, exchange)
        wanted = usable[0]
    from engine.kernels.cpu import open_cpu_backend

    try:
        backend = open_cpu_backend(wanted, cores, count, exchange)
    except ValueError:
        allowed = ", ".join(("auto", REFERENCE, *usable))
        raise ConfigError(f"--cpu-isa is {wanted!r}; this machine can run {allowed}") from None
    torch.set_num_threads(1)  # torch is left with trifles, and its threads would spin between them
    return backend


def take_gpu(first: int, place: tuple[int, int]) -> torch.device:
    """The GPU of rank number place[0] of place[1] on this host, which becomes the process's current device: number
    `first` (`--base-gpu-id`) for rank 0, and the next ones for the others.

    Raises ConfigError, naming what there is, where not each of the host's ranks has one.
    """
    number, ranks = place
    if not torch.cuda.is_available():
        raise ConfigError(
            f"--device is cuda; torch {torch.__version__} sees no such GPU on this machine; "
            "--device cpu serves on its processor"
        )
    count = torch.cuda.device_count()
    if first + ranks > count:
        raise ConfigError(
            f"--base-gpu-id is {first}, and from that one on each rank of this machine (there are {ranks}) wants a GPU "
            f"of its own; torch sees {count}: 0 to {count - 1}"
        )
    device = torch.device("cuda", first + number)
    torch.cuda.set_device(device)
    return device


def open_gpu(device: torch.device, group: DeviceGroup = ALONE) -> Backend:
    """The backend on a GPU, or on "cpu", where Triton's interpreter runs the same kernels. Raises ConfigError without
    triton."""
    try:
        from engine.kernels.gpu.backend import open_gpu_backend
    except ImportError as error:
        raise ConfigError(f"--device is cuda; its kernels need triton: install tokenmill[gpu] ({error})") from None
    return open_gpu_backend(device, group)


def _reference(threads: int, exchange: Exchange | None) -> Backend:
    torch.set_num_threads(threads)
    if exchange is None:
        return EagerBackend()
    from engine.kernels.exchange_group import ExchangeGroup

    return EagerBackend(group=ExchangeGroup(exchange))


def _keep_to(cores: list[int]) -> None:
    if hasattr(os, "sched_setaffinity"):
        try:
            os.sched_setaffinity(0, cores)
        except OSError as error:
            logger.warning("This rank cannot keep to the cores %s: %s", cores, error)
