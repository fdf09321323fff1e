"""Python, torch, and how long their import takes."""

from __future__ import annotations

import subprocess
import sys

from engine.doctor.finding import Finding

SLOW_IMPORT = 10.0
_MEASURE = (
    "import time; began = time.perf_counter(); import torch; spent = time.perf_counter() - began; "
    "print(torch.__version__, torch.version.cuda or '-', spent)"
)


def python(release: tuple[int, ...], executable: str) -> Finding:
    shown = ".".join(map(str, release[:3]))
    if release < (3, 11):
        return Finding("python", "error", f"{shown} at {executable}", "Tokenmill needs Python 3.11 or newer")
    return Finding("python", "ok", f"{shown} at {executable}")


def torch_import() -> Finding:
    """Import torch in a process of its own, whose time is that of every start of the scheduler."""
    done = subprocess.run([sys.executable, "-P", "-c", _MEASURE], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        advice = "install it again: pip install --force-reinstall torch"
        return Finding("torch", "error", f"cannot be imported: {lines[-1]}", advice)
    return judge_torch(*done.stdout.split())


def judge_torch(release: str, cuda: str, seconds: str) -> Finding:
    """What `_MEASURE` has printed; cuda: "-" for a build without it."""
    build = "CPU build" if cuda == "-" else f"build for CUDA {cuda}, of which only the CPU part is used"
    message = f"{release}, {build}; imported in {float(seconds):.1f} s"
    if float(seconds) > SLOW_IMPORT:
        advice = "every start waits for it: move the installation to a faster disk, or use the CPU build of torch"
        return Finding("torch", "warning", message, advice)
    return Finding("torch", "ok", message)
