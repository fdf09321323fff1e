"""What happens to the requests in flight when a process has died: who is to blame, and how each goes on."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Mapping
from typing import Protocol

import msgspec

from engine.wire.lifecycle import Lost
from engine.wire.results import Finish
from engine.wire.to_tokenizer import Generate
from http_frontend.errors import RefusedError
from http_frontend.journal import Entry, Journal, Request
from http_frontend.timeline import mark_replay

log = logging.getLogger(__name__)

_NOT_AGAIN = "deaths of the scheduler and is not tried again."
MOST_DEATHS = 3
"""A request in flight at so many deaths of the scheduler, none of which is known to be due to another, is given up."""
MOST_UNCERTAIN_TRIALS = 2
"""At so many deaths by SIGKILL, which may come from outside, a request may be on trial."""


MOST_STRIKES, MOST_UNCERTAIN_STRIKES = 2, 3
"""So many deaths of the tokenizer, or the detokenizer, that had it in hand end a request or a question; the second
number where the last one may have come from outside."""


class Question(Protocol):
    """A question without an answer (`http_frontend/ring.py`)."""

    sent: bool
    deaths: int
    strikes: int

    @property
    def for_scheduler(self) -> bool: ...

    def fail(self, error: Exception) -> None: ...


def blame(journal: Journal, asked: Mapping[int, Question], lost: Lost) -> None:
    """After the death of a process: end the request, or the question, that has caused it, if that is known, or those
    that were there too often; note it of the others."""
    if lost.process == "scheduler":
        if not lost.loaded:
            return  # it had not heard of any of them
        _blame_for_step(journal, lost)
        for question in [one for one in asked.values() if one.sent and one.for_scheduler]:
            question.deaths += 1
            if question.deaths >= MOST_DEATHS:
                question.fail(RefusedError("A", f"This was asked at {question.deaths} {_NOT_AGAIN}", 500))
        return
    culprit = asked.get(lost.suspect or 0) or journal.entry(lost.suspect or 0)
    if culprit is None:
        return
    culprit.strikes += 1
    if culprit.strikes < (MOST_STRIKES if lost.certain else MOST_UNCERTAIN_STRIKES):
        return
    words = f"was in the hands of the {lost.process} at {culprit.strikes} of its deaths and is not tried again."
    if isinstance(culprit, Entry):
        _end(journal, culprit, f"Request {culprit.message.rid} {words}")
    else:
        log.error("A call %s", words)
        culprit.fail(RefusedError("A", f"This {words}", 500))


def _blame_for_step(journal: Journal, lost: Lost) -> None:
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
    sent = journal.sent()
    ran = sent if lost.computed is None else _those(sent, lost.computed)
    # Trials have acquitted who was there at so many deaths: then it may be one that only waits.
    clueless = any(entry.deaths + 1 >= MOST_DEATHS for entry in ran)
    for entry in sent if clueless or not ran else ran:
        entry.deaths += 1
        # A first SIGKILL is most often somebody's command: trials would only make the pause longer.
        if lost.certain or entry.deaths > 1:
            entry.suspect = entry.deaths
        if entry.deaths >= MOST_DEATHS:
            _give_up(journal, entry)


def _those(entries: Iterable[Entry], keys: Iterable[int]) -> list[Entry]:
    wanted = set(keys)
    return [entry for entry in entries if entry.key in wanted]


def _give_up(journal: Journal, entry: Entry) -> None:
    _end(journal, entry, f"Request {entry.message.rid} was in flight at {entry.deaths} {_NOT_AGAIN}")


def _end(journal: Journal, entry: Entry, message: str) -> None:
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
