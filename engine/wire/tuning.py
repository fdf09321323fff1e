"""What every process of the ring does with a `Tune`."""

from __future__ import annotations

import gc
import logging

from engine.config.logs import set_level
from engine.wire.operation import Tune

log = logging.getLogger(__name__)


def tune(message: Tune) -> None:
    """Obey `message` in this process."""
    if message.log_level is not None:
        try:
            set_level(message.log_level)
        except ValueError:
            log.exception("there is no such log level as %r", message.log_level)
        else:
            log.info("log level: %s", message.log_level)
    if message.freeze_gc:
        gc.collect()
        gc.freeze()
        log.info("garbage collection frozen: %d objects", gc.get_freeze_count())
