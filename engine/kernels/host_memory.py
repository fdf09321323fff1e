"""Settings of the C library's allocator that torch on a CPU gains from."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEEP = 1 << 30  # bytes; also the largest block that is kept


def keep_freed_memory() -> bool:
    """Let the process keep freed memory for its next allocation; False where the C library is not glibc.

    glibc hands large freed blocks back to the system, and the next activation of that size pays a page fault for
    each 4 KiB. Where faults are dear (virtual machines), that more than doubles the time of a step.
    Call it once weights are loaded: what is freed afterwards stays with the process.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEEP)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEEP))
