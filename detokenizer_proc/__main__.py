"""`python -m detokenizer_proc --config FILE`: the detokenizer process."""

from __future__ import annotations

import gc
import sys

import zmq

from detokenizer_proc.replies import detokenized
from detokenizer_proc.steps import StepDecoder
from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.tokenizer import Tokenizer, load_tokenizer
from engine.config import RunConfig, faults
from engine.wire.board import BEATS, Heart
from engine.wire.operation import Tune
from engine.wire.process import arguments, begin, play, report_ready
from engine.wire.sockets import Inbox, Outbox, Sender
from engine.wire.to_detokenizer import Detokenize, StepOutput, ToDetokenizer
from engine.wire.to_frontend import Ended, StartedOver, ToFrontend
from engine.wire.to_scheduler import StopSeen, ToScheduler
from engine.wire.tuning import tune


def main() -> None:
    config = begin(arguments("the detokenizer process").config, "detokenizer")
    try:
        tokenizer = _load(config)
    except CheckpointError as error:
        sys.exit(f"error: {error}")
    context = zmq.Context()
    inbox: Inbox[ToDetokenizer] = Inbox(context, config.runtime_dir, "detokenizer", ToDetokenizer)
    frontend: Outbox[ToFrontend] = Outbox(context, config.runtime_dir, "frontend")
    scheduler: Outbox[ToScheduler] = Outbox(context, config.runtime_dir, "scheduler")
    heart = Heart(config.runtime_dir, "detokenizer")
    decoder = StepDecoder(tokenizer, heart.board)
    gc.collect()
    gc.freeze()  # what is loaded now lives until the end: the collector need not look at it again
    report_ready(context, config, "detokenizer")
    while True:
        heart.beat()
        if faults.armed:
            faults.spring_in_loop("detokenizer")
        inbox.wait(BEATS)
        for message in inbox.drain():
            heart.beat()
            heart.board.hold("detokenizer", message.key if isinstance(message, Detokenize) else 0)
            handle(message, decoder, tokenizer, config.facts.vocab_size, frontend, scheduler)
            heart.board.hold("detokenizer", 0)


def handle(
    message: ToDetokenizer,
    decoder: StepDecoder,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    frontend: Sender[ToFrontend],
    scheduler: Sender[ToScheduler],
) -> None:
    """Carry a message out. A step that makes no sense ends the requests it names, and nothing else."""
    if isinstance(message, StepOutput):
        try:
            step, ended = decoder.decode(message)
        except Exception as error:
            failed = decoder.fail(message, error)
            scheduler.send(StopSeen([one.key for one in failed], [one.attempt for one in failed]))
            for one in failed:
                frontend.send(one)
            return
        if ended:
            attempts = dict(zip(message.keys, message.attempts, strict=True))
            scheduler.send(StopSeen(ended, [attempts[key] for key in ended]))
        if step is not None:
            frontend.send(step)
    elif isinstance(message, Detokenize):
        frontend.send(detokenized(message, tokenizer, vocab_size))
    elif isinstance(message, Tune):
        tune(message)
    else:
        if isinstance(message, Ended):
            decoder.forget(message.key)
        elif isinstance(message, StartedOver):
            decoder.forget_before(message.before)
        frontend.send(message)


def _load(config: RunConfig) -> Tokenizer | None:
    if config.tokenizer is None or config.server.skip_tokenizer_init:
        return None
    return load_tokenizer(config.tokenizer, mode=config.server.tokenizer_mode)


if __name__ == "__main__":
    play(main)
