"""`python -m tokenizer_proc --config FILE`: the tokenizer process."""

from __future__ import annotations

import gc
import logging
import sys

import zmq

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.tokenizer import Tokenizer, load_tokenizer
from engine.config import ConfigError, RunConfig, faults
from engine.config.environment import count_limit
from engine.wire.board import BEATS, Heart
from engine.wire.failures import internal_error
from engine.wire.operation import Tune
from engine.wire.process import arguments, begin, play, report_ready
from engine.wire.sockets import Inbox, Outbox, Sender
from engine.wire.to_frontend import Ended, ToFrontend
from engine.wire.to_scheduler import ToScheduler
from engine.wire.to_tokenizer import Embed, Generate, Judge, Tokenize, ToTokenizer
from engine.wire.tuning import tune
from tokenizer_proc.admission import admit
from tokenizer_proc.long_calls import LongCalls
from tokenizer_proc.replies import tokenized
from tokenizer_proc.validation import Bounds

logger = logging.getLogger(__name__)


def main() -> None:
    config = begin(arguments("the tokenizer process").config, "tokenizer")
    try:
        bounds = bounds_of(config)
        tokenizer = _load(config)
    except (CheckpointError, ConfigError) as error:
        sys.exit(f"error: {error}")
    context = zmq.Context()
    inbox: Inbox[ToTokenizer] = Inbox(context, config.runtime_dir, "tokenizer", ToTokenizer)
    frontend: Outbox[ToFrontend] = Outbox(context, config.runtime_dir, "frontend")
    scheduler: Outbox[ToScheduler] = Outbox(context, config.runtime_dir, "scheduler")
    heart = Heart(config.runtime_dir, "tokenizer")
    calls = LongCalls()
    gc.collect()
    gc.freeze()  # what is loaded now lives until the end: the collector need not look at it again
    report_ready(context, config, "tokenizer")
    while True:
        heart.beat()
        if faults.armed:
            faults.spring_in_loop("tokenizer")
        inbox.wait(0 if calls else BEATS)
        for message in inbox.drain():
            heart.beat()
            if calls.enter(message):
                continue
            key = message.key if isinstance(message, Generate | Embed | Judge | Tokenize) else 0
            heart.board.hold("tokenizer", key)
            handle(message, tokenizer, bounds, frontend, scheduler)
            heart.board.hold("tokenizer", 0)
        if calls:
            heart.beat()
            heart.board.hold("tokenizer", calls.key)
            if (answer := calls.go_on(tokenizer, bounds.context_length)) is not None:
                frontend.send(answer)
            heart.board.hold("tokenizer", 0)


def handle(
    message: ToTokenizer,
    tokenizer: Tokenizer | None,
    bounds: Bounds,
    frontend: Sender[ToFrontend],
    scheduler: Sender[ToScheduler],
) -> None:
    """Carry a message out. One that fails ends its request, or is answered with an error, and nothing else."""
    if isinstance(message, Generate | Embed | Judge):
        _admit(message, tokenizer, bounds, frontend, scheduler)
    elif isinstance(message, Tokenize):
        frontend.send(tokenized(message, tokenizer, bounds.context_length))
    else:
        if isinstance(message, Tune):
            tune(message)
        scheduler.send(message)


def _admit(
    message: Generate | Embed | Judge,
    tokenizer: Tokenizer | None,
    bounds: Bounds,
    frontend: Sender[ToFrontend],
    scheduler: Sender[ToScheduler],
) -> None:
    """Send a request on, or its end back. What cannot be put into a message ends its request alone."""
    outcome = admit(message, tokenizer, bounds)
    try:
        if isinstance(outcome, Ended):
            frontend.send(outcome)
        else:
            accepted, admitted = outcome
            frontend.send(accepted)
            scheduler.send(admitted)
    except (ValueError, TypeError, OverflowError) as error:
        finish = internal_error(logger, "sending", message.rid, error)
        frontend.send(Ended(message.key, message.attempt, finish, "scheduler"))


def bounds_of(config: RunConfig) -> Bounds:
    """What the checks need to know of this launch. Raises ConfigError for a limit that is no number."""
    return Bounds(
        vocab_size=config.facts.vocab_size,
        context_length=config.facts.context_length,
        auto_truncate=config.server.allow_auto_truncate,
        max_new_tokens_limit=count_limit("MAX_NEW_TOKENS_LIMIT"),
        has_tokenizer=not config.server.skip_tokenizer_init,
        segments=config.facts.pooled.segments if config.facts.pooled else 0,
        grammars=config.server.grammar_backend != "none",
    )


def _load(config: RunConfig) -> Tokenizer | None:
    server = config.server
    if config.tokenizer is None or server.skip_tokenizer_init:
        return None
    return load_tokenizer(config.tokenizer, mode=server.tokenizer_mode, chat_template=server.chat_template)


if __name__ == "__main__":
    play(main)
