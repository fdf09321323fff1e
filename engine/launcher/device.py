"""Which device `--device auto` means, found out without importing torch, which would cost the launcher seconds."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

# The driver's, and WSL's.
_NODES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))


def served_device(wanted: str, ranks: int) -> str:
    """ "cuda" or "cpu" for `--device` and `--tp-size`. Several ranks run on CPUs alone so far.

    What only looks like a GPU is found out as the model is loaded; the error then names `--device cpu`.
    """
    if wanted != "auto":
        return wanted
    return "cuda" if ranks == 1 and _driver() and _torch_for_cuda() and importlib.util.find_spec("triton") else "cpu"


def _driver() -> bool:
    return any(node.exists() for node in _NODES)


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
