"""Which device `--device auto` means, found out without importing torch, which would cost the launcher seconds."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Literal

Lack = Literal["gpu", "torch", "triton"]
"""What serving on GPUs needs: a GPU for each rank, a torch that is built for CUDA, and triton."""

_DEVICES = Path("/dev")
_DRIVERS = ("nvidiactl", "dxg")
"""The driver's, and WSL's."""
_GPU = re.compile(r"nvidia\d+")


def served_device(wanted: str, ranks: int, first: int = 0) -> str:
    """ "cuda" or "cpu" for `--device`, the ranks of this machine and `--base-gpu-id`: each rank wants a GPU of its own.

    What only looks like a GPU is found out as the model is loaded; the error then names `--device cpu`.
    """
    if wanted != "auto":
        return wanted
    return "cpu" if lacks(ranks, first) else "cuda"


def lacks(ranks: int, first: int = 0) -> list[Lack]:
    """What this machine lacks to serve so many ranks on its GPUs, from number `first` on."""
    there: dict[Lack, bool] = {
        "gpu": first + ranks <= gpu_count(),
        "torch": _torch_for_cuda(),
        "triton": importlib.util.find_spec("triton") is not None,
    }
    return [name for name, found in there.items() if not found]


def gpu_count() -> int:
    """How many GPUs the processes of this machine may use, as far as the driver's nodes and CUDA_VISIBLE_DEVICES tell;
    1 where there is a driver that shows no nodes."""
    count = sum(bool(_GPU.fullmatch(node.name)) for node in _DEVICES.iterdir())
    if not count and any((_DEVICES / driver).exists() for driver in _DRIVERS):
        count = 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    named = 0
    for name in visible.split(","):
        if name.strip() in ("", "-1"):  # CUDA looks no further
            break
        named += 1
    return min(count, named)


def _torch_for_cuda() -> bool:
    """Whether the installed torch is a build for CUDA: its version.py has `cuda: Optional[str] = '12.8'`, or None."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return False
    return re.search(r"^cuda\b[^=\n]*=\s*['\"]\d", text, re.MULTILINE) is not None
