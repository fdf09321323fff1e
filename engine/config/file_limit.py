"""How many descriptors a process may have open: a connection takes one of the frontend's.

Shells and systemd give a soft limit of 1024 by default, for the sake of programs that use select(2). Each process of
the tree raises its own when it begins, whoever has started it; the launcher has no use for more.
"""

from __future__ import annotations

import logging
import resource

log = logging.getLogger(__name__)

ENOUGH = 65536


def raise_file_limit() -> None:
    """Raise this process's soft limit to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:  # some systems allow less than the hard limit says
        log.warning("the limit of open files stays at %d: %s", soft, error)


def reachable(hard: int) -> int:
    """The soft limit that a hard one allows, as far as it is of use."""
    return ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
