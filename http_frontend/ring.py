"""The frontend's sockets: what comes off the ring goes into the journal or to the call that waits for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import zmq

from engine.config import faults
from engine.wire.board import BEATS, Heart
from engine.wire.lifecycle import Drain, FromLauncher, GiveUp, Lost, Serving, ToLauncher, Warm
from engine.wire.operation import Profile, Profiled, SlowDown, Tune
from engine.wire.sockets import Inbox, Outbox
from engine.wire.to_detokenizer import Detokenize, ToDetokenizer
from engine.wire.to_frontend import (
    Accepted,
    Detokenized,
    Ended,
    ExpertsRecorded,
    Failed,
    Flushed,
    StartedOver,
    State,
    TextStep,
    ToFrontend,
    Tokenized,
    Vectors,
)
from engine.wire.to_scheduler import FlushCache, QueryState, RecordExperts, StartOver
from engine.wire.to_tokenizer import Tokenize, ToTokenizer
from engine.wire.weights import Paused, WeightControl, WeightRows, WeightsUpdated
from http_frontend.columns import check_text_step, check_vectors
from http_frontend.errors import RefusedError
from http_frontend.journal import Journal
from http_frontend.replay import replayed

log = logging.getLogger(__name__)

SchedulerQuestion = FlushCache | QueryState | RecordExperts | WeightControl | Profile
Question = Tokenize | Detokenize | SchedulerQuestion
Answer = (
    Flushed | State | ExpertsRecorded | WeightsUpdated | WeightRows | Paused | Tokenized | Detokenized | Profiled
    | Failed
)  # fmt: skip
_KEYS_OF_A_LIFE = 1 << 30
"""More than any frontend gives."""

A = TypeVar("A", bound=Answer)


@dataclass(slots=True)
class Asked:
    """A question without an answer. sent: it is on its way, or was lost with a process.

    deaths: of the scheduler, while it was sent. strikes: of the tokenizer or the detokenizer, with it in hand.
    """

    question: Question
    future: asyncio.Future[Answer]
    sent: bool = False
    deaths: int = 0
    strikes: int = 0

    @property
    def for_scheduler(self) -> bool:
        return isinstance(self.question, SchedulerQuestion)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Ring:
    """All sockets of the frontend. To be made and used on one event loop.

    asked: questions without an answer, by key.
    on_scheduler: called after any message that the scheduler has caused. on_launcher: called with the launcher's word.
    on_weights: called with what the scheduler says of the weights and of pauses, before the call that waits for it.
    on_state: called with every state of the scheduler, whoever asked for it.
    on_failure: called when what the launcher says cannot be applied, which is a bug: nothing can be trusted any more.
    """

    def __init__(self, context: zmq.Context[Any], runtime_dir: str) -> None:
        self._inbox: Inbox[ToFrontend] = Inbox(context, runtime_dir, "frontend", ToFrontend)
        self._tokenizer: Outbox[ToTokenizer] = Outbox(context, runtime_dir, "tokenizer")
        self._detokenizer: Outbox[ToDetokenizer] = Outbox(context, runtime_dir, "detokenizer")
        self._launcher: Outbox[ToLauncher] = Outbox(context, runtime_dir, "launcher")
        self.asked: dict[int, Asked] = {}
        self._held = False
        self._heart = Heart(runtime_dir, "frontend")
        # Keys must not repeat even when this process has died and come back: the other processes remember the old. Nor
        # may they fall when the clock is set back.
        self._next_key = max(time.time_ns() // 1_000_000 << 20, self._heart.board.keys)
        self._heart.board.keys = self._next_key + _KEYS_OF_A_LIFE
        self.journal = Journal(self._tokenizer.send)
        self.on_scheduler: Callable[[], None] = _ignore
        self.on_launcher: Callable[[FromLauncher], None] = _ignore
        self.on_weights: Callable[[WeightsUpdated | Paused | StartedOver], None] = _ignore
        self.on_state: Callable[[State], None] = _ignore
        self.on_failure: Callable[[BaseException], None] = _ignore

    def next_key(self) -> int:
        """A number that no item and no control call has had."""
        self._next_key += 1
        return self._next_key

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to read. Messages that are there already are read at once: the descriptor is edge-triggered."""
        self._loop = loop
        loop.add_reader(self._inbox.fileno(), self._read)
        loop.call_soon(self._read)
        self._beat()

    def close(self) -> None:
        """Stop reading and close the sockets."""
        self._beating.cancel()
        self._loop.remove_reader(self._inbox.fileno())
        self._inbox.close()
        for outbox in (self._tokenizer, self._detokenizer, self._launcher):
            outbox.close()

    def tell_warm(self) -> None:
        """Tell the launcher that `/health` is 200 from now on."""
        self._launcher.send(Warm())

    def nudge(self) -> None:
        """Ask the scheduler for its state, for the sake of `on_scheduler` alone: nobody waits for the answer."""
        if not self._held:
            self._tokenizer.send(QueryState(self.next_key()))

    def hold(self) -> None:
        """Send nothing from now on: a process is lost."""
        self._held = True
        self.journal.hold()

    def start_over(self, paused: bool | None) -> None:
        """Have the ring forget all that was asked of it until now, except questions."""
        self._tokenizer.send(StartOver(self.next_key(), paused))

    def release(self) -> int:
        """Send again: what was in flight, as new attempts; what has waited; and the questions that nobody has answered.

        Returns how many requests were in flight.
        """
        self._held = False
        lost, fresh = self.journal.release()
        asked = [one for one in self.asked.values() if not one.future.done()]
        for one in asked:
            one.sent = True
        messages = [*replayed(lost), *(entry.message for entry in fresh), *(one.question for one in asked)]
        for message in sorted(messages, key=lambda message: message.key):  # keys grow: in the order of asking
            self._send(message)
        return len(lost)

    async def answered_within(self, seconds: float) -> None:
        """Wait until every question has its answer, at most so long. A profile may wait for steps that never come."""
        waiting = [one.future for one in self.asked.values() if not isinstance(one.question, Profile)]
        if waiting:
            await asyncio.wait(waiting, timeout=seconds)

    def fail_questions(self, error: Exception) -> None:
        """Answer every question that waits with `error`."""
        for one in self.asked.values():
            one.fail(error)

    def _send(self, message: ToTokenizer | Detokenize) -> None:
        if isinstance(message, Detokenize):
            self._detokenizer.send(message)
        else:
            self._tokenizer.send(message)

    def _beat(self) -> None:
        try:
            self._heart.beat()
            if faults.armed:
                faults.spring_in_loop("frontend")
        except BaseException as error:
            self.on_failure(error)
            raise
        self._beating = self._loop.call_later(BEATS / 2, self._beat)

    def tell(self, message: Tune | SlowDown) -> None:
        """Send a control message that nobody answers. While a process is lost it is left out: what has been set is
        told again to all (`Frontend.keep`) once they are there."""
        if not self._held:
            self._tokenizer.send(message)

    async def ask(self, message: Question, answer: type[A]) -> A:
        """Send a control message and wait for its answer, as long as it takes.

        Raises RefusedError (500) when the scheduler has failed to carry it out.
        """
        future: asyncio.Future[Answer] = self._loop.create_future()
        self.asked[message.key] = Asked(message, future, sent=not self._held)
        try:
            if not self._held:
                self._send(message)
            reply = await future
        finally:
            del self.asked[message.key]
        if isinstance(reply, Failed):
            raise RefusedError("A", reply.message, 500)
        if not isinstance(reply, answer):
            raise TypeError(f"{type(message).__name__} was answered by {type(reply).__name__}")
        return reply

    def _read(self) -> None:
        try:
            while messages := self._inbox.drain():
                if len(messages) > 1:
                    # An acceptance takes another way than the request's tokens and may lie behind them.
                    messages.sort(key=_is_not_acceptance)
                for message in messages:
                    self._take(message)
        except BaseException as error:
            self.on_failure(error)
            raise

    def _take(self, message: ToFrontend) -> None:
        """Apply a message of the ring. One that makes no sense ends the requests that it names, and nothing else; but
        what the launcher says has to be understood."""
        try:
            self._apply(message)
        except Exception as error:
            if isinstance(message, FromLauncher):
                raise
            log.exception("%s cannot be applied", type(message).__name__)
            if isinstance(message, TextStep):
                self.journal.fail([*message.keys, *(begun.key for begun in message.begun)], error)
            elif isinstance(message, Vectors):
                self.journal.fail(message.keys, error)

    def _apply(self, message: ToFrontend) -> None:
        match message:
            case TextStep():
                check_text_step(message)
                self.journal.text_step(message)
                self.on_scheduler()
            case Vectors():
                check_vectors(message)
                self.journal.vectors(message)
                self.on_scheduler()
            case Accepted():
                self.journal.accepted(message)
            case Ended():
                self.journal.ended(message)
                if message.origin == "scheduler":
                    self.on_scheduler()
            case (
                Flushed() | State() | ExpertsRecorded() | WeightsUpdated() | WeightRows() | Paused()
                | Tokenized() | Detokenized() | Profiled() | Failed()
            ):  # fmt: skip
                asked = self.asked.get(message.key)
                if asked is not None and not asked.future.done():
                    asked.future.set_result(message)  # who waits goes on in a later turn of the loop
                if isinstance(message, State):
                    self.on_state(message)
                if isinstance(message, WeightsUpdated | Paused):
                    self.on_weights(message)
                if not isinstance(message, Tokenized | Detokenized):
                    self.on_scheduler()
            case StartedOver():
                self.on_weights(message)
                self.on_scheduler()
            case Serving() | Lost() | GiveUp() | Drain():
                self.on_launcher(message)


def _is_not_acceptance(message: ToFrontend) -> bool:
    return not isinstance(message, Accepted)


def _ignore(*_args: object) -> None:
    return None
