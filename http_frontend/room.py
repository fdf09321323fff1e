"""Whether the scheduler's queue has room for a call, as far as that can be told without asking it.

At full load the way to the scheduler and back is as long as a step of it, and all that is on its way takes memory. What
is in flight is counted here: so many items fit the server, running and waiting, and those beyond are refused at once.
The scheduler has the last word on the rest, and when it has said that its queue is full, that holds until one of its
requests has begun or ended, or for a second.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from engine.config import ServerConfig
from engine.config.server import QUEUED_REQUESTS, QUEUED_TOKENS
from engine.wire.results import Finish
from engine.wire.to_tokenizer import Embed, Generate, Judge
from http_frontend.errors import RefusedError

FULL_SECONDS = 1.0
QUEUE_FULL = "The request queue is full."

_CHARACTERS = 4
"""A text counts as a token for so many characters until its tokens are counted."""

Request = Generate | Embed | Judge


class Counted(Protocol):
    """What is counted of the journal's entries."""

    queued_tokens: int
    prompt_tokens: int
    probe: bool

    @property
    def message(self) -> Request: ...

    @property
    def followers(self) -> Sequence[object]: ...


class Room:
    """Numbers of what is in flight. The server's own requests do not count, nor does a prompt that is computed once for
    several samples, beside these.

    items: requests. tokens: prompt tokens of those that have not begun.
    """

    def __init__(self) -> None:
        self.items = 0
        self.tokens = 0
        self._full_until = 0.0

    def enter(self, entry: Counted) -> None:
        if _counts(entry):
            self.items += 1
            entry.queued_tokens = prompt_tokens(entry.message)
            self.tokens += entry.queued_tokens

    def accept(self, entry: Counted) -> None:
        """The tokens of its prompt are known."""
        if entry.queued_tokens:
            self.tokens += entry.prompt_tokens - entry.queued_tokens
            entry.queued_tokens = entry.prompt_tokens

    def begin(self, entry: Counted) -> None:
        self._full_until = 0.0
        self.tokens -= entry.queued_tokens
        entry.queued_tokens = 0

    def leave(self, entry: Counted) -> None:
        self.begin(entry)
        self.items -= _counts(entry)

    def refused(self, finish: Finish) -> None:
        """A request has been ended before its first token; perhaps because the scheduler's queue was full."""
        if finish.status == 503 and finish.message == QUEUE_FULL and self.items:
            self._full_until = time.monotonic() + FULL_SECONDS

    def check(self, messages: Iterable[Request], server: ServerConfig, running: int, *, paused: bool) -> None:
        """Raise the `RefusedError` of a call for which there is no room. running: requests that may run at once."""
        self.check_sizes([prompt_tokens(message) for message in messages], server, running, paused=paused)

    def check_sizes(self, sizes: Sequence[int], server: ServerConfig, running: int, *, paused: bool) -> None:
        """`check` for a call of requests whose prompts have so many tokens."""
        most = server.max_queued_requests or QUEUED_REQUESTS
        most_tokens = server.max_queued_tokens or QUEUED_TOKENS
        if paused:  # nobody is to see an error through a pause, but it is not to take all memory either
            most, most_tokens = max(most, QUEUED_REQUESTS), max(most_tokens, QUEUED_TOKENS)
        full = time.monotonic() < self._full_until
        if server.enable_priority_scheduling:  # a more urgent request takes the place of another
            most, most_tokens, full = 2 * most, 2 * most_tokens, False
        over = self.items + len(sizes) > running + most
        # A prompt of any length may wait alone.
        alone = not self.tokens and len(sizes) == 1
        many = not alone and self.tokens + sum(sizes) > most_tokens + self._in_hand(server, running)
        if sizes and (over or many or (full and not paused)):
            raise RefusedError("D", QUEUE_FULL, 503, "503")

    def _in_hand(self, server: ServerConfig, running: int) -> int:
        """Prompt tokens that may be computed at the moment, and so wait no longer though they have not begun."""
        return running * (server.context_length or 0)


def prompt_tokens(message: Request) -> int:
    """Of the message's prompt; an estimate while that is a text."""
    match message:
        case Generate(input_ids=ids) | Embed(input_ids=ids) if ids is not None:
            return len(ids) // 4
        case Generate(text=text) | Embed(text=text):
            return 1 + len(text or "") // _CHARACTERS
        case Judge():
            return 1 + (len(message.query) + len(message.document)) // _CHARACTERS


def _counts(entry: Counted) -> bool:
    return not entry.probe and not entry.followers
