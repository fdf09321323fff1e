"""The processor and the system. Every check takes what was read, so that a test can say what a machine is like."""

from __future__ import annotations

from engine.doctor.finding import Finding

_ISAS = {
    "amx": ("amx_tile", "amx_bf16"),
    "avx512bf16": ("avx512_bf16",),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx2": ("avx2", "fma", "f16c"),
}
"""Best first; each needs those below it. The flags are those of /proc/cpuinfo."""
FEW_FILES = 4096


def processor(cpuinfo: str | None, machine: str) -> Finding:
    """machine: as `uname -m` says."""
    if cpuinfo is None or machine not in ("x86_64", "AMD64"):
        advice = "serve on x86-64 with AVX2; here the slow reference kernels serve"
        return Finding("processor", "warning", f"{machine}: there are no compiled kernels for it", advice)
    fields = {
        name.strip(): value.strip()
        for name, separator, value in (line.partition(":") for line in cpuinfo.splitlines())
        if separator
    }
    has = set(fields.get("flags", "").split())
    usable: list[str] = []
    for isa in reversed(_ISAS):
        if not has.issuperset(_ISAS[isa]):
            break
        usable.insert(0, isa)
    name = fields.get("model name", "unknown processor")
    if not usable:
        advice = "serve on a processor of 2013 or later; a virtual machine may have to be given the host's CPU model"
        return Finding("processor", "warning", f"{name}: no AVX2, so the slow reference kernels serve", advice)
    return Finding("processor", "ok", f"{name}: {', '.join(usable)}")


def threads(wanted: int | None, cores: int, logical: int, quota: float | None, unseen_quota: float | None) -> Finding:
    """wanted: --cpu-threads. cores: physical ones that this process may use, within its quota. logical: processors
    that it may use. quota, unseen_quota: processors' worth of time that its cgroup grants, by version 2, which the
    server heeds, and version 1, which it does not; None: no limit."""
    count = wanted or cores
    shown = f"{count} threads on {cores} physical cores ({logical} processors"
    shown += ")" if quota is None else f", of whose time the cgroup grants {quota:g})"
    if unseen_quota is not None and count > unseen_quota:
        advice = f"give --cpu-threads {max(1, int(unseen_quota))}"
        return Finding("threads", "warning", f"{shown}; a cgroup of version 1 grants {unseen_quota:g}", advice)
    if count > logical or (quota is not None and count > quota + 1):
        advice = f"threads that wait for a processor delay every step: leave --cpu-threads out, or give {cores}"
        return Finding("threads", "warning", shown, advice)
    return Finding("threads", "ok", shown)


def huge_pages(enabled: str | None) -> Finding:
    """enabled: of /sys/kernel/mm/transparent_hugepage."""
    if enabled is None:
        return Finding("huge pages", "ok", "this system does not have transparent ones")
    chosen = enabled.partition("[")[2].partition("]")[0] or enabled.strip()
    if chosen == "never":
        advice = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, as root at each start of the machine"
        return Finding("huge pages", "warning", "transparent huge pages are off, so weights are read slower", advice)
    return Finding("huge pages", "ok", f"transparent huge pages: {chosen}")


def overcommit(mode: str | None) -> Finding:
    """mode: vm.overcommit_memory. The pool is a mapping whose pages are taken only as they are used."""
    if mode is not None and mode.strip() == "2":
        advice = "sysctl vm.overcommit_memory=0, or a pool of a fixed size with --max-total-tokens"
        return Finding("overcommit", "warning", "the system grants only memory that it has, used or not", advice)
    return Finding("overcommit", "ok", "memory is taken as it is used")


def open_files(allowed: int) -> Finding:
    """allowed: to each process, once the server has raised its own limit as far as it may. Each connection is a
    descriptor of the frontend's."""
    if allowed >= FEW_FILES:
        return Finding("open files", "ok", f"{allowed} for each process")
    message = f"{allowed} for each process, and each client that is connected takes one"
    advice = "raise the hard limit: LimitNOFILE=65536 in the unit, or nofile in /etc/security/limits.conf"
    return Finding("open files", "error" if allowed < 128 else "warning", message, advice)


def clock(now: float, installed_at: float) -> Finding:
    """Seconds since 1970; installed_at: the newest time that must have passed already."""
    if now < installed_at - 60:
        message = f"the clock is {installed_at - now:.0f} s behind the time at which Tokenmill was installed"
        advice = "set it (timedatectl set-ntp true): certificates are checked and requests are logged by it"
        return Finding("clock", "warning", message, advice)
    return Finding("clock", "ok", "plausible")


def text_encoding(files: str, preferred: str) -> Finding:
    """What Python makes of the locale."""
    wrong = [name for name in (files, preferred) if name.lower().replace("-", "") != "utf8"]
    if wrong:
        advice = "set LC_ALL=C.UTF-8 (or PYTHONUTF8=1)"
        return Finding("locale", "warning", f"the encoding is {wrong[0]}: logs and paths may be garbled", advice)
    return Finding("locale", "ok", "UTF-8")


def shared_memory(total: int | None, writable: bool) -> Finding:
    """total: bytes of /dev/shm; None where there is none. Only groups of ranks will need it."""
    if total is None or not writable:
        advice = "mount a tmpfs there, or give a container --shm-size 1g, before serving on more than one rank"
        return Finding("/dev/shm", "warning", "missing or not writable", advice)
    return Finding("/dev/shm", "ok", f"{total / 1e9:.1f} GB")


def quota_v1(granted: str | None, period: str | None) -> float | None:
    """Processors' worth of time by cpu.cfs_quota_us and cpu.cfs_period_us of version 1; None: no limit."""
    if granted is None or period is None or int(granted) <= 0 or int(period) <= 0:
        return None
    return int(granted) / int(period)


def limit_v1(limit: str | None) -> int | None:
    """Bytes, by memory.limit_in_bytes of version 1, whose word for no limit is a number near 2**63; None: no limit."""
    return None if limit is None or int(limit) >= 1 << 60 else int(limit)


def cgroup_v1(cgroup: str | None, controller: str) -> str | None:
    """The folder of a controller of version 1 under /sys/fs/cgroup, by /proc/self/cgroup; None: it is not of that."""
    for line in (cgroup or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return f"/sys/fs/cgroup/{controllers}{path.rstrip('/')}"
    return None
