"""Python, torch, how long its import takes, and what it finds on this machine."""

from __future__ import annotations

import subprocess
import sys

import msgspec

from engine.doctor.finding import Finding

SLOW_IMPORT = 10.0
_LOOK = """
import json, time, warnings
began = time.perf_counter()
import torch
seconds = time.perf_counter() - began
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
gpus = []
for number in range(count):
    free, total = torch.cuda.mem_get_info(number)
    gpus.append({"name": torch.cuda.get_device_name(number), "free": free, "total": total})
print(json.dumps({
    "release": torch.__version__, "cuda": torch.version.cuda, "seconds": seconds, "gpus": gpus,
    "nccl": torch.distributed.is_available() and torch.distributed.is_nccl_available(),
    "warning": str(said[-1].message) if said else "",
}))
"""


class Gpu(msgspec.Struct, frozen=True):
    """free, total: bytes of its memory."""

    name: str
    free: int
    total: int


class Torch(msgspec.Struct, frozen=True):
    """What `_LOOK` has found. cuda: the release that it is built for; None: a build for CPUs. seconds: its import took.
    gpus: those that it can compute on. nccl: whether it has the library by which GPUs talk. warning: what it had to
    say of the GPUs; empty for nothing."""

    release: str
    cuda: str | None
    seconds: float
    gpus: tuple[Gpu, ...] = ()
    nccl: bool = False
    warning: str = ""


def python(release: tuple[int, ...], executable: str) -> Finding:
    shown = ".".join(map(str, release[:3]))
    if release < (3, 11):
        return Finding("python", "error", f"{shown} at {executable}", "Tokenmill needs Python 3.11 or newer")
    return Finding("python", "ok", f"{shown} at {executable}")


def look_at_torch() -> Torch | str:
    """Import torch in a process of its own, whose time is that of every start of the scheduler, and let it look for
    GPUs there. Returns the error where that fails."""
    done = subprocess.run([sys.executable, "-P", "-c", _LOOK], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return lines[-1]
    return msgspec.json.decode(done.stdout, type=Torch)


def judge_torch(found: Torch | str) -> Finding:
    """found: what `look_at_torch` has returned."""
    if isinstance(found, str):
        advice = "install it again: pip install --force-reinstall torch"
        return Finding("torch", "error", f"cannot be imported: {found}", advice)
    build = "CPU build" if found.cuda is None else f"build for CUDA {found.cuda}"
    message = f"{found.release}, {build}; imported in {found.seconds:.1f} s"
    if found.seconds > SLOW_IMPORT:
        advice = "every start waits for it: move the installation to a faster disk"
        advice += "" if found.cuda is None else ", or use the CPU build of torch where no GPU serves"
        return Finding("torch", "warning", message, advice)
    return Finding("torch", "ok", message)
