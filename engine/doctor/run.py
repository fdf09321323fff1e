"""The command: which checks there are, and how they are shown."""

from __future__ import annotations

import functools
import locale
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

import engine
from engine.config import ServerConfig
from engine.config.command_line import BriefParser, parse_serve
from engine.doctor import device, machine, place, software
from engine.doctor.finding import Finding, read_text
from engine.launcher.device import gpu_count

Check = Callable[[], Iterable[Finding]]


def doctor(argv: Sequence[str]) -> int:
    """Check this machine for the server that `argv` describes; returns 1 if it would not serve, else 0.

    Nothing is downloaded. A word that `tokenmill serve` refuses ends the process with exit code 2.
    """
    parser = BriefParser(
        prog="tokenmill doctor",
        usage="%(prog)s [--json] [MODEL] [FLAGS OF tokenmill serve]",
        description="Check whether this machine can serve, and say what to change where it cannot.",
        epilog="exit code: 0, or 1 if there is an error",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    own, flags = parser.parse_known_args(list(argv))
    command = parse_serve(flags)
    os.environ["HF_HUB_OFFLINE"] = "1"
    findings = []
    for finding in _all(command.config, command.warnings):
        findings.append(finding)
        if not own.json:
            print(finding.line(), flush=True)
    counts = {level: sum(finding.level == level for finding in findings) for level in ("ok", "warning", "error")}
    if own.json:
        report = {"version": engine.__version__, "counts": counts, "findings": findings}
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        print(f"{counts['error']} errors, {counts['warning']} warnings")
    return 1 if counts["error"] else 0


def _all(config: ServerConfig, warnings: Sequence[str]) -> Iterator[Finding]:
    for warning in warnings:
        yield Finding("flags", "warning", warning, "leave it out")
    torch = functools.cache(software.look_at_torch)
    checks: dict[str, Check] = {
        "python": lambda: [software.python(sys.version_info[:3], sys.executable)],
        "torch": lambda: [software.judge_torch(torch())],
        "device": lambda: [device.device(config, gpu_count(), torch())],
        "processor": lambda: [machine.processor(read_text("/proc/cpuinfo"), platform.machine())],
        "kernels": lambda: _kernels(config),
        "threads": lambda: [_threads(config)],
        "huge pages": lambda: [machine.huge_pages(read_text("/sys/kernel/mm/transparent_hugepage/enabled"))],
        "overcommit": lambda: [machine.overcommit(read_text("/proc/sys/vm/overcommit_memory"))],
        "open files": lambda: [_open_files()],
        "/dev/shm": lambda: [_shared_memory()],
        "runtime folder": lambda: [place.sockets_folder(os.environ)],
        "port": lambda: [place.port(config)],
        "clock": lambda: [machine.clock(time.time(), Path(engine.__file__).stat().st_mtime)],
        "locale": lambda: [machine.text_encoding(sys.getfilesystemencoding(), locale.getpreferredencoding(False))],
        "model": lambda: _model(config, torch()),
    }
    if device.is_cuda(config):  # the processor's kernels and threads are idle
        for name in ("processor", "kernels", "threads"):
            del checks[name]
    for name, check in checks.items():
        yield from _guarded(name, check)


def _guarded(name: str, check: Check) -> Iterator[Finding]:
    """A check that fails itself is an error like any other, and does not end the rest."""
    try:
        yield from check()
    except Exception as error:
        yield Finding(name, "error", f"the check failed: {type(error).__name__}: {error}", "please report this")


def _kernels(config: ServerConfig) -> list[Finding]:
    from engine.doctor.kernels import kernels

    return [kernels(config)]


def _model(config: ServerConfig, torch: software.Torch | str) -> Iterator[Finding]:
    from engine.doctor.model import have_now, have_on_gpus, model

    if device.is_cuda(config):
        gpus = () if isinstance(torch, str) else device.gpus_of_ranks(config, torch)
        return model(config, have_on_gpus(config, gpus))
    folder = machine.cgroup_v1(read_text("/proc/self/cgroup"), "memory")
    limit = machine.limit_v1(read_text(f"{folder}/memory.limit_in_bytes")) if folder else None
    return model(config, have_now(limit))


def _threads(config: ServerConfig) -> Finding:
    from engine.kernels.cores import physical_cores, quota

    folder = machine.cgroup_v1(read_text("/proc/self/cgroup"), "cpu")
    unseen = None
    if folder:
        unseen = machine.quota_v1(read_text(f"{folder}/cpu.cfs_quota_us"), read_text(f"{folder}/cpu.cfs_period_us"))
    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return machine.threads(config.cpu_threads, len(physical_cores()), logical, quota(), unseen)


def _open_files() -> Finding:
    import resource

    from engine.config.file_limit import reachable

    return machine.open_files(reachable(resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return machine.shared_memory(None, False)
    status = os.statvfs(folder)
    return machine.shared_memory(status.f_blocks * status.f_frsize, os.access(folder, os.W_OK))
