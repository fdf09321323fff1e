"""What would be served on, the processor or GPUs, and what is missing for these."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config import ServerConfig
from engine.doctor.finding import Finding
from engine.doctor.software import Gpu, Torch
from engine.launcher.device import Lack, lacks, served_device


def ranks_here(config: ServerConfig) -> int:
    """How many ranks of the model this machine has."""
    return config.tp_size // config.nnodes


def is_cuda(config: ServerConfig) -> bool:
    """Whether `tokenmill serve` would take GPUs."""
    return served_device(config.device, ranks_here(config), config.base_gpu_id) == "cuda"


def gpus_of_ranks(config: ServerConfig, torch: Torch) -> tuple[Gpu, ...]:
    """The GPUs of this machine's ranks, as far as there are any."""
    return torch.gpus[config.base_gpu_id : config.base_gpu_id + ranks_here(config)]


def device(config: ServerConfig, count: int, torch: Torch | str) -> Finding:
    """count: of the GPUs that the driver shows. torch: what it has found in a process of its own, or its error."""
    if config.device == "cpu":
        return Finding("device", "ok", "the CPU serves, as --device cpu says")
    ranks, first = ranks_here(config), config.base_gpu_id
    missing = lacks(ranks, first)
    found = f"the driver shows {_gpus(count)}"
    wanted = _gpus(ranks) if not first else f"{_gpus(ranks)} from number {first} on"
    if config.device == "auto" and missing:
        message = f"the CPU serves: --device auto takes a GPU for each rank, and {found}"
        if not count:
            return Finding("device", "ok", message)
        return Finding("device", "warning", f"{message}; {_missing(missing)}", _advice(missing, ranks, first))
    if isinstance(torch, Torch) and len(gpus_of_ranks(config, torch)) == ranks:
        missing = [lack for lack in missing if lack != "gpu"]  # however the driver shows them
    if missing:
        message = f"--device cuda wants {wanted}, and {found}; {_missing(missing)}"
        return Finding("device", "error", message, _advice(missing, ranks, first))
    if isinstance(torch, str):
        return Finding("device", "error", f"GPUs would serve, and torch cannot be imported: {torch}", "see torch")
    return _seen(config, torch, wanted)


def _seen(config: ServerConfig, torch: Torch, wanted: str) -> Finding:
    """Whether torch can use what the driver shows."""
    serves = f"--device {config.device} serves on {wanted}"
    gpus = gpus_of_ranks(config, torch)
    if len(gpus) < ranks_here(config):
        message = f"{serves}, and torch can use {_gpus(len(torch.gpus))} in all"
        message += f": {torch.warning}" if torch.warning else ""
        advice = f"see nvidia-smi; the driver must be new enough for CUDA {torch.cuda}; or give --device cpu"
        return Finding("device", "error", message, advice)
    if config.tp_size > 1 and not torch.nccl:
        message = f"{serves}, which talk by NCCL, and this torch has none"
        return Finding("device", "error", message, "install torch's build for CUDA on Linux, or give --device cpu")
    return Finding("device", "ok", f"{serves}: {', '.join(gpu.name for gpu in gpus)}")


def _missing(lacking: Sequence[Lack]) -> str:
    words: dict[Lack, str] = {
        "gpu": "a GPU for each rank",
        "torch": "a torch that is built for CUDA",
        "triton": "triton",
    }
    return "missing: " + ", ".join(words[one] for one in lacking)


def _advice(lacking: Sequence[Lack], ranks: int, first: int) -> str:
    words: dict[Lack, str] = {
        "gpu": f"install the driver of {_gpus(first + ranks)} (nvidia-smi shows them), let CUDA_VISIBLE_DEVICES name "
        "them, or give fewer ranks (--tp-size) or a lower --base-gpu-id",
        "torch": "install a torch for CUDA: pip install --force-reinstall torch --index-url "
        "https://download.pytorch.org/whl/cu128",
        "triton": "pip install tokenmill[gpu]",
    }
    return "; ".join([*(words[one] for one in lacking), "--device cpu says that the CPU is meant"])


def _gpus(count: int) -> str:
    return f"{count or 'no'} GPU{'' if count == 1 else 's'}"
