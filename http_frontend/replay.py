"""What happens to the requests in flight when a process has died: who is to blame, and how each goes on."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable

import msgspec

from engine.wire.lifecycle import Lost
from engine.wire.results import Finish
from engine.wire.to_tokenizer import Generate
from http_frontend.journal import Entry, Journal, Request
from http_frontend.timeline import mark_replay

log = logging.getLogger(__name__)

MOST_DEATHS = 3
"""A request in flight at so many deaths of the scheduler, none of which is known to be due to another, is given up."""
MOST_UNCERTAIN_TRIALS = 2
"""At so many deaths by SIGKILL, which may come from outside, a request may be on trial."""


def blame(journal: Journal, lost: Lost) -> None:
    """After a death of the scheduler: end the request that has caused it, if that is known, or those that were there
    too often; note it of the others."""
    culprit = None if lost.suspect is None else journal.entry(lost.suspect)
    if lost.suspect is not None:
        if culprit is None:
            return
        culprit.deaths += 1
        culprit.trials += 1
        culprit.suspect = culprit.deaths
        if lost.certain or culprit.trials >= MOST_UNCERTAIN_TRIALS:
            _give_up(journal, culprit)
        return
    for entry in journal.sent():
        entry.deaths += 1
        # A first SIGKILL is most often somebody's command: trials would only make the pause longer.
        if lost.certain or entry.deaths > 1:
            entry.suspect = entry.deaths
        if entry.deaths >= MOST_DEATHS:
            _give_up(journal, entry)


def _give_up(journal: Journal, entry: Entry) -> None:
    message = (
        f"Request {entry.message.rid} was in flight at {entry.deaths} deaths of the scheduler and is not tried again."
    )
    log.error(message)
    journal.end(entry, Finish("abort", message=message, status=500))


def replayed(entries: Iterable[Entry]) -> list[Request]:
    """The messages that go on with `entries` where they stand, as new attempts."""
    return [_next_attempt(entry) for entry in entries]


def _next_attempt(entry: Entry) -> Request:
    entry.attempt += 1
    entry.replays += 1
    mark_replay(entry)
    entry.earlier_retractions = entry.retractions
    message = entry.message
    if not isinstance(message, Generate):
        return msgspec.structs.replace(message, attempt=entry.attempt, suspect=entry.suspect)
    logprobs = message.logprobs
    if logprobs is not None and entry.input_logprobs is not None:
        logprobs = msgspec.structs.replace(logprobs, start=-1)  # they have come already
    known = bool(entry.prompt_ids)
    return msgspec.structs.replace(
        message,
        attempt=entry.attempt,
        suspect=entry.suspect,
        text=None if known else message.text,
        input_ids=entry.prompt_ids if known else message.input_ids,
        output_ids=array("i", entry.output_ids).tobytes(),
        logprobs=logprobs,
    )
