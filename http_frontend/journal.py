"""The journal: everything the server knows of the requests in flight.

The frontend owns requests; every other process can be rebuilt from here. An entry keeps the message that
started it, the prompt's ids once the tokenizer has reported them, and all output so far, so that it can be sent
again (attempt + 1, its output as a prefix) when a process has died. Messages are columns of a whole step, applied in
one loop.
"""

from __future__ import annotations

import logging
import sys
import time
from array import array
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from engine.wire.failures import internal_error
from engine.wire.results import Finish, InputLogprobs, TokenLogprobs
from engine.wire.to_frontend import Accepted, Ended, TextStep, Vectors
from engine.wire.to_scheduler import Abort
from engine.wire.to_tokenizer import Embed, Generate, Judge, ToTokenizer
from http_frontend.room import Room

log = logging.getLogger(__name__)

Request = Generate | Embed | Judge
"""A message that starts an item, and is answered by tokens or by a vector."""

NEVER = sys.maxsize
"""`Entry.due` of a request whose owner wants to hear only of its end."""

_ABORTED = Finish("abort", message="Aborted")
_ABORTED_WAITING = Finish("abort", message="Abort in waiting queue")
_ANSWERED = Finish("length", length=0)
"""How a request ends whose vector has come."""


class Entry:
    """One item in flight.

    notify: called with the entry when it has ended, or has at least `due` output ids. It sets `due` anew.
    asked_rid: what the client called it, where the item has a rid of its own (parallel samples).
    texts, output_ids, logprobs: what has come so far; `logprobs` has a row a token, and one without a token for a
    request of 0 new tokens. logprob_texts: text of each id that the logprobs name, if asked.
    vector, hidden: the answer to an `Embed` and its pooled hidden state, if asked (float32, little-endian).
    weight_version: of the weights that computed the newest output; empty until there is some.
    probe: the server's own request (health, warm-up), which no client can see or abort.
    followers: entries that are sent once this one has ended well.
    aborted: the scheduler was asked to end it. deaths: of the scheduler, while it was in flight; trials: those of them
    at which it was on trial. strikes: deaths of the tokenizer or the detokenizer that had it in hand. suspect: what the
    scheduler is told of it. replays: how often it was sent again. earlier_retractions: of earlier attempts.
    queued_tokens: prompt tokens that `Room` counts for it.
    arrived, accepted_at, admitted_at, first_at, finished: when it came here, left the tokenizer, was begun by the
    scheduler, had its first output here, ended (`time.perf_counter()`; 0.0: not yet). replayed: each of its replays.
    last_token: when its newest token came, where metrics are kept. quiet: it is not to be logged.
    """

    __slots__ = (
        "aborted", "accepted_at", "admitted_at", "arrived", "asked_rid", "attempt", "cached_tokens", "deaths", "due",
        "earlier_retractions", "finish", "finished", "first_at", "followers", "hidden", "index", "input_logprobs",
        "key", "last_token", "logprob_texts", "logprobs", "message", "notify", "origin", "output_ids", "probe",
        "prompt_ids", "prompt_tokens", "queued_tokens", "quiet", "replayed", "replays", "retractions", "sent",
        "strikes", "suspect", "texts", "trials", "vector", "weight_version",
    )  # fmt: skip

    def __init__(
        self,
        message: Request,
        notify: Callable[[Entry], None],
        *,
        due: int = NEVER,
        index: int = 0,
        asked_rid: str | None = None,
        probe: bool = False,
    ) -> None:
        self.message = message
        self.key = message.key
        self.attempt = message.attempt
        self.notify = notify
        self.due = due
        self.index = index
        self.asked_rid = asked_rid
        self.probe = probe
        self.followers: list[Entry] = []
        self.sent = False
        self.aborted = False
        self.deaths = self.trials = self.strikes = self.suspect = self.replays = self.earlier_retractions = 0
        self.arrived = time.perf_counter()
        self.accepted_at = self.admitted_at = self.first_at = self.last_token = self.finished = 0.0
        self.replayed: tuple[float, ...] = ()
        self.quiet = False
        self.prompt_ids = b""
        self.prompt_tokens = 0
        self.queued_tokens = 0
        self.cached_tokens = 0
        self.input_logprobs: InputLogprobs | None = None
        self.logprob_texts: dict[int, str] = {}
        self.texts: list[str] = []
        self.output_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.vector = b""
        self.hidden = b""
        self.retractions = 0
        self.weight_version = ""
        self.finish: Finish | None = None
        self.origin = "scheduler"

    def prompt(self) -> array[int]:
        """The prompt's ids, empty until the tokenizer has reported them."""
        ids: array[int] = array("i")
        ids.frombytes(self.prompt_ids)
        return ids


class TokenTimes(Protocol):
    """What is told of the times of tokens, a step at a time."""

    def tokens(self, seconds: float, count: int) -> None:
        """`count` entries have each a token, `seconds` after the one before."""
        ...

    def token(self, entry: Entry, now: float) -> None:
        """`entry` has a token whose predecessor did not come with the step before this one, or that is its first."""
        ...


class Journal:
    """All entries in flight, by key. `send` puts a message on the ring.

    While a process is lost (`hold`), what is to be sent waits here until `release`.
    on_entered, on_ended: called with each entry that comes and goes; one whose client has left has no `finish`.
    token_times: None where nobody wants them.
    """

    def __init__(self, send: Callable[[ToTokenizer], None]) -> None:
        self._send = send
        self._entries: dict[int, Entry] = {}
        self._rids: dict[str, Entry] = {}
        self._clients = 0
        self._held: list[Entry] | None = None
        self.room = Room()
        self._step_at = -1.0
        self.on_idle: Callable[[], None] | None = None
        self.on_entered: Callable[[Entry], None] = nothing_to_do
        self.on_ended: Callable[[Entry], None] = nothing_to_do
        self.token_times: TokenTimes | None = None

    def __len__(self) -> int:
        """Requests of clients in flight; the server's own do not count."""
        return self._clients

    def is_running(self, rid: str) -> bool:
        return rid in self._rids

    def enter(self, entries: Iterable[Entry]) -> None:
        """Take `entries` in without sending them."""
        for entry in entries:
            self._entries[entry.key] = entry
            self._rids[entry.message.rid] = entry
            self._clients += not entry.probe
            self.room.enter(entry)
            self.on_entered(entry)

    def submit(self, entries: Iterable[Entry]) -> None:
        """Take `entries` in and send them."""
        entries = list(entries)
        self.enter(entries)
        self._dispatch(entries)

    def hold(self) -> None:
        """Send nothing from now on."""
        if self._held is None:
            self._held = []

    def release(self) -> tuple[list[Entry], list[Entry]]:
        """Send again from now on. Returns the entries that were in flight and are to be replayed, and those that have
        waited; all of them count as sent. What was being aborted has ended here."""
        held, self._held = self._held or [], None
        for entry in [entry for entry in self.sent() if entry.aborted]:
            self.end(entry, _ABORTED)
        lost = self.sent()
        held = [entry for entry in held if entry.key in self._entries]
        for entry in held:
            entry.sent = True
        return lost, held

    def sent(self) -> list[Entry]:
        """The entries that are somewhere in the ring."""
        return [entry for entry in self._entries.values() if entry.sent]

    def entry(self, key: int) -> Entry | None:
        return self._entries.get(key)

    def end(self, entry: Entry, finish: Finish) -> None:
        """End an entry here and now."""
        self._end(entry, finish, "scheduler")

    def abort(self, entries: Iterable[Entry]) -> None:
        """Ask the scheduler to end `entries`; what was never sent, or cannot be asked for now, ends here."""
        keys = []
        for entry in list(entries):
            if entry.finish is None and entry.sent and self._held is not None:
                self._end(entry, _ABORTED, "scheduler")
            elif entry.finish is None and entry.sent:
                entry.aborted = True
                keys.append(entry.key)
            elif entry.finish is None:
                self._end(entry, _ABORTED_WAITING, "scheduler")
        if keys:
            self._send(Abort(keys))

    def forget(self, entries: Iterable[Entry]) -> None:
        """Abort `entries` and drop them: nobody waits for them any more."""
        gone = [entry for entry in entries if self._drop(entry)]
        for entry in gone:
            entry.finished = time.perf_counter()
            self.on_ended(entry)
        keys = [entry.key for entry in gone if entry.sent]
        if keys and self._held is None:
            self._send(Abort(keys))

    def expire(self, entries: Iterable[Entry], finish: Finish) -> None:
        """End `entries` here and now with `finish`, and have the scheduler end them too."""
        keys = []
        for entry in entries:
            if entry.key in self._entries:
                keys += [entry.key] if entry.sent else []
                self._end(entry, finish, "scheduler")
        if keys:
            self._send(Abort(keys))

    def match(self, prefix: str | None) -> list[Entry]:
        """Clients' entries whose rid, or the rid they were asked under, starts with `prefix` (None: all)."""
        entries = [entry for entry in self._entries.values() if not entry.probe]
        if prefix is None:
            return entries
        return [
            entry
            for entry in entries
            if entry.message.rid.startswith(prefix) or (entry.asked_rid or "").startswith(prefix)
        ]

    def end_all(self, finish: Finish) -> None:
        """End every entry here and now with `finish`: the rest of the server does not answer any more."""
        for entry in list(self._entries.values()):
            self._end(entry, finish, "scheduler")

    def accepted(self, message: Accepted) -> None:
        entry = self._entries.get(message.key)
        if entry is not None and entry.attempt == message.attempt and not entry.output_ids:
            entry.accepted_at = entry.accepted_at or message.at
            entry.prompt_ids = message.input_ids
            entry.prompt_tokens = len(message.input_ids) // 4
            self.room.accept(entry)

    def ended(self, message: Ended) -> None:
        entry = self._entries.get(message.key)
        if entry is not None and entry.attempt == message.attempt:
            try:
                self._end(entry, message.finish, message.origin)
            except Exception as error:
                self._break(entry, error)
            self.room.refused(message.finish)

    def text_step(self, step: TextStep) -> None:
        """Apply a step's columns. Rows of unknown keys and of older attempts are skipped."""
        entries = self._entries
        told = self.token_times
        now, before, regular = time.perf_counter(), self._step_at, 0
        self._step_at = now
        for begun in step.begun:
            entry = entries.get(begun.key)
            if entry is None or entry.attempt != begun.attempt:
                continue
            self.room.begin(entry)
            if not entry.first_at:
                entry.admitted_at, entry.first_at = begun.admitted_at, now
            if begun.texts:
                entry.logprob_texts.update(begun.texts)
            if not entry.output_ids:
                entry.prompt_tokens = begun.prompt_tokens
                entry.prompt_ids = entry.prompt_ids[: 4 * begun.prompt_tokens]  # the scheduler may have cut it
                entry.cached_tokens = begun.cached_tokens
                entry.input_logprobs = begun.input_logprobs
        retracted = step.retracted
        finished = step.finished
        logprobs = step.logprobs
        version = step.weight_version
        row = -1
        for key, attempt, text, token in zip(step.keys, step.attempts, step.texts, step.tokens, strict=True):
            row += 1
            entry = entries.get(key)
            if entry is None or entry.attempt != attempt:
                continue
            try:
                if text:
                    entry.texts.append(text)
                if retracted and key in retracted:
                    entry.retractions = entry.earlier_retractions + retracted[key]
                entry.weight_version = version
                output_ids = entry.output_ids
                if token >= 0:
                    output_ids.append(token)
                    if told is not None:
                        if entry.last_token == before:
                            entry.last_token = now
                            regular += 1
                        else:
                            told.token(entry, now)
                if logprobs and row in logprobs:
                    entry.logprobs.append(logprobs[row])
                    if row in step.logprob_texts:
                        entry.logprob_texts.update(step.logprob_texts[row])
                if finished and row in finished:
                    self._end(entry, finished[row], "scheduler")
                elif len(output_ids) >= entry.due:
                    entry.notify(entry)
            except Exception as error:
                self._break(entry, error)
        if regular and told is not None:
            told.tokens(now - before, regular)

    def vectors(self, step: Vectors) -> None:
        """Apply a step's vectors: each ends its entry. Rows of unknown keys and of older attempts are skipped."""
        end = 0
        for row, (key, attempt, width) in enumerate(zip(step.keys, step.attempts, step.widths, strict=True)):
            start, end = end, end + 4 * width
            entry = self._entries.get(key)
            if entry is None or entry.attempt != attempt:
                continue
            try:
                entry.vector = step.entries[start:end]
                entry.hidden = step.hidden.get(row, b"")
                entry.weight_version = step.weight_version
                entry.prompt_tokens = step.prompt_tokens[row]
                entry.retractions = step.retracted.get(key, entry.retractions)
                self._end(entry, _ANSWERED, "scheduler")
            except Exception as error:
                self._break(entry, error)

    def fail(self, keys: Iterable[int], error: Exception) -> None:
        """End the entries that a message names which cannot be applied: what follows would have a gap."""
        for entry in [self._entries[key] for key in dict.fromkeys(keys) if key in self._entries]:
            self._break(entry, error)

    def _dispatch(self, entries: Iterable[Entry]) -> None:
        if self._held is not None:
            self._held += entries
            return
        for entry in entries:
            entry.sent = True
            self._send(entry.message)

    def _end(self, entry: Entry, finish: Finish, origin: str) -> None:
        if not self._drop(entry):
            return
        entry.finish = finish
        entry.origin = origin
        entry.finished = time.perf_counter()
        self.on_ended(entry)
        followers = [follower for follower in entry.followers if follower.key in self._entries]
        if finish.kind == "abort":
            for follower in followers:
                follower.prompt_ids, follower.prompt_tokens = entry.prompt_ids, entry.prompt_tokens
                self._end(follower, finish, origin)
        else:
            self._dispatch(followers)
        entry.notify(entry)

    def _break(self, entry: Entry, error: Exception) -> None:
        """End `entry` alone with status 500: what has come for it cannot be taken in, or its owner cannot be told."""
        finish = internal_error(log, "delivering", entry.message.rid, error)
        try:
            if entry.key in self._entries:
                if entry.sent:
                    self._send(Abort([entry.key]))
                self._end(entry, finish, "scheduler")
            else:  # it broke in its end
                entry.finish = finish
                entry.notify(entry)
        except Exception:
            log.exception("Request %s has ended, and its owner cannot be told", entry.message.rid)

    def _drop(self, entry: Entry) -> bool:
        """Take `entry` out; false when it was out already."""
        if self._entries.pop(entry.key, None) is None:
            return False
        self.room.leave(entry)
        if self._rids.get(entry.message.rid) is entry:
            del self._rids[entry.message.rid]
        if not entry.probe:
            self._clients -= 1
            if self._clients == 0 and self.on_idle is not None:
                self.on_idle()
        return True


def nothing_to_do(entry: Any) -> None:
    """`notify` of an entry whose end concerns only its followers."""
