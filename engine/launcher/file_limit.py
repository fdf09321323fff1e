"""How many descriptors each process may have open: a connection takes one of the frontend's."""

from __future__ import annotations

import logging
import resource

log = logging.getLogger(__name__)

ENOUGH = 65536


def raise_file_limit() -> None:
    """Raise the soft limit of this process, which its children inherit, to ENOUGH or what the hard one allows.

    Shells and systemd give a soft limit of 1024 by default, for the sake of programs that use select(2).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = reachable(hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:  # some systems allow less than the hard limit says
        log.warning("the limit of open files stays at %d: %s", soft, error)


def reachable(hard: int) -> int:
    """The soft limit that a hard one allows, as far as it is of use."""
    return ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
