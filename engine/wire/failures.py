"""How a request ends that has failed for a reason which is the server's, not its client's."""

from __future__ import annotations

import logging

from engine.config.logs import about
from engine.wire.results import Finish


def internal_error(logger: logging.Logger, doing: str, rid: str, error: BaseException) -> Finish:
    """Log `error` with its traceback, and return the end of request `rid`. Log and message name it alike.

    doing: "computing", "admitting"...
    """
    logger.error("Request %s failed: error while %s it", rid, doing, exc_info=error, extra=about(rid))
    message = f"Internal error while {doing} request {rid}: {type(error).__name__}: {error}"
    return Finish("abort", message=message, status=500)


def is_failure(error: BaseException) -> bool:
    """Whether this is a failure and not a call to stop. The panics of packages written in Rust are no Exceptions."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
