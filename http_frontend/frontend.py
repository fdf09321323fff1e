"""The frontend's state, shared by all routes: configuration, ring, and where the server is in its life."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import zmq

from engine.config import RunConfig
from engine.config.logs import about
from engine.config.run import note_standing
from engine.wire.lifecycle import Drain, FromLauncher, GiveUp, Limits, Lost, Serving
from engine.wire.operation import SlowDown, Tune
from engine.wire.results import Finish
from engine.wire.to_frontend import StartedOver
from engine.wire.weights import Paused, WeightsUpdated
from http_frontend.defaults import read_preferred
from http_frontend.errors import RefusedError
from http_frontend.items import Desk
from http_frontend.journal import Entry, Request
from http_frontend.metrics import Metrics, count_replays, count_restart
from http_frontend.pulse import Pulse, WarmUpError, warm_up
from http_frontend.replay import blame
from http_frontend.request_log import open_request_log
from http_frontend.ring import Ring
from http_frontend.scheduler_state import StateWatch
from http_frontend.turnstile import Turnstile

log = logging.getLogger(__name__)

_ABORTED = Finish("abort", message="Aborted")
_ANSWER_GRACE = 2.0
"""Seconds that the scheduler gets to answer the aborts of a drain before they are answered here."""


class Frontend:
    """One frontend. `start` must run on the event loop that serves.

    ended: resolves when a drain is over, or with the error that ends the process.
    run: the launch's, with the names of the model that serves now. paused: nothing is computed for now.
    standing: what an operator has set since, as it is noted for the processes that are started from now on.
    metrics: what is counted, whether or not `/metrics` shows it; only the times of tokens wait for --enable-metrics.
    warm: `/health` may be 200. startup_seconds: from the launch until then.
    stop_accepting: called when a drain leaves new connections to the next server.
    turnstile: where calls that compute wait before they begin.
    epoch: the newest that the launcher has told. lost: processes that are dead and not replaced yet.
    """

    def __init__(self, run: RunConfig, context: zmq.Context[Any]) -> None:
        preferred = read_preferred(run.server)
        self.run = run
        self.ring = Ring(context, run.runtime_dir)
        self.journal = self.ring.journal
        self.desk = Desk(
            run=run,
            preferred=preferred,
            next_key=self.ring.next_key,
            seeds=random.Random(run.server.random_seed),
            is_running=self.journal.is_running,
        )
        self.metrics = Metrics()
        self.metrics.epoch = run.epoch
        self.request_log = open_request_log(run.server, run.standing)
        self.watch = StateWatch(self.ring)
        self.turnstile = Turnstile()
        self.weight_version = run.server.weight_version
        self.standing = run.standing
        self.paused = run.standing.paused
        self.warm = False
        self.draining = False
        self.startup_seconds = 0.0
        self.stop_accepting: Callable[[], None] = lambda: None
        self.epoch = run.epoch
        self.reborn = run.epoch > 0
        self.lost: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Open the ring and wait for the launcher's word."""
        self.loop = loop
        self.limits: asyncio.Future[Limits] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.pulse = Pulse(self.ring, loop, generates=self.run.facts.is_generation)
        self.ring.on_scheduler = self.pulse.beat
        self.ring.on_launcher = self._hear
        self.ring.on_weights = self._weights
        self.ring.on_state = self.watch.take
        self.journal.on_entered = self._entered
        self.journal.on_ended = self._left
        self.journal.token_times = self.metrics if self.run.server.enable_metrics else None
        self.ring.on_failure = self._fail
        self.ring.open(loop)
        if self.reborn:
            # What the frontend before this one has asked for concerns nobody any more.
            self.ring.start_over(None)

    def keep(self, **changes: Any) -> None:
        """Note what an operator has set (fields of `Standing`), so that no death of a process undoes it."""
        standing = msgspec.structs.replace(self.standing, **changes)
        if standing == self.standing:
            return
        self.standing = standing
        try:
            note_standing(self.run.runtime_dir, standing)
        except OSError:
            log.exception("What has been set cannot be noted, and is lost with the processes that know it")

    def _tell_standing(self) -> None:
        """A process that was loading while something was set has heard nothing of it."""
        standing = self.standing
        if standing.log_level is not None or standing.gc_frozen:
            self.ring.tell(Tune(log_level=standing.log_level, freeze_gc=standing.gc_frozen))
        self.ring.tell(SlowDown(standing.step_sleep))

    @property
    def up(self) -> bool:
        """Ready to work, whole, and not about to leave."""
        return self.warm and not self.draining and not self.lost

    def check_open(self) -> None:
        """Raise the 503 of a server that is about to leave."""
        if self.draining:
            raise RefusedError("D", "The server is shutting down.", 503)

    def check_room(self, messages: Iterable[Request]) -> None:
        """Raise the 503 of a server whose queue has no room for these."""
        self.journal.room.check(messages, self.run.server, self._running(), paused=self.paused)

    def check_any_room(self) -> None:
        """Raise the 503 of a server whose queue has no room for the smallest call: what a call asks for need not be
        looked at."""
        self.journal.room.check_sizes((1,), self.run.server, self._running(), paused=self.paused)

    def _running(self) -> int:
        return self.limits.result().max_running_requests if self.limits.done() else 0

    def _entered(self, entry: Entry) -> None:
        """An entry has come into the journal."""
        if log.isEnabledFor(logging.DEBUG):
            rid = entry.message.rid
            log.debug("request %s received (key %d)", rid, entry.key, extra=about(rid))
        self.request_log.received(entry)

    def _left(self, entry: Entry) -> None:
        """An entry has left the journal."""
        if log.isEnabledFor(logging.DEBUG):
            rid, how = entry.message.rid, "its client has gone" if entry.finish is None else entry.finish.kind
            log.debug("request %s ends: %s, %d new tokens", rid, how, len(entry.output_ids), extra=about(rid))
        self.metrics.ended(entry)
        self.request_log.ended(entry)

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)

    def _weights(self, message: WeightsUpdated | Paused | StartedOver) -> None:
        """After an update the model goes by its new name everywhere; the tokenizer is the launch's all along."""
        self.paused = message.paused
        self.keep(paused=message.paused)
        if isinstance(message, Paused):
            return
        self.weight_version = message.weight_version
        if isinstance(message, StartedOver):
            return
        path, run = message.model_path, self.run
        server = msgspec.structs.replace(run.server, weight_version=message.weight_version)
        if path is not None:
            run = msgspec.structs.replace(run, model=msgspec.structs.replace(run.model, name=path))
            server = msgspec.structs.replace(
                server,
                model_path=path,
                served_model_name=path,
                tokenizer_path=server.tokenizer_path or self.run.model.name,
            )
        self.run = msgspec.structs.replace(run, server=server)
        self.desk = dataclasses.replace(self.desk, run=self.run)

    def _hear(self, message: FromLauncher) -> None:
        match message:
            case Serving():
                self._serving(message)
            case Lost():
                self._lost(message)
            case GiveUp():
                self._give_up(message)
            case Drain():
                self._spawn(self._drain(message))

    def _serving(self, message: Serving) -> None:
        if message.epoch < self.epoch:
            return  # another process has died since
        if self.lost:
            self._go_on()
        if not self.limits.done():
            self.limits.set_result(message.limits)
            if self.reborn:
                self._tell_standing()
            self._spawn(self._warm_up())

    def _lost(self, message: Lost) -> None:
        """A process is dead: nothing is sent until it is replaced, and `/health` is 503."""
        if message.epoch <= self.epoch:
            return  # it was meant for a frontend before this one
        self.epoch = message.epoch
        self.lost.add(message.process)
        count_restart(self.metrics, message.process, message.epoch)
        self.ring.hold()
        blame(self.journal, self.ring.asked, message)
        log.warning("the %s is lost: %d requests wait for another", message.process, len(self.journal))
        # Health checks that wait for a sign of life have their answer: 503.
        self.pulse.wake()

    def _go_on(self) -> None:
        """All processes are there again: have them forget what they know, and tell them what is in flight."""
        self.ring.start_over(self.paused if "scheduler" in self.lost else None)
        self.lost.clear()
        replays = self.ring.release()
        self._tell_standing()
        count_replays(self.metrics, replays)
        log.info("whole again: %d requests were sent anew", replays)

    def _give_up(self, message: GiveUp) -> None:
        self.draining = True
        self.pulse.wake()
        self.ring.fail_questions(RefusedError("D", message.message, 500))
        self.journal.end_all(Finish("abort", message=message.message, status=500))
        if not self.ended.done():
            self.ended.set_result(None)

    async def _warm_up(self) -> None:
        # Where only this process is new, the others are warm.
        if not self.run.server.skip_server_warmup and not self.reborn:
            try:
                await warm_up(
                    self.ring,
                    self.loop,
                    with_text=self.run.tokenizer is not None,
                    generates=self.run.facts.is_generation,
                )
            except WarmUpError as error:
                # A server on its way out aborts its warm-up too, and that is no fault.
                if self.draining:
                    return
                log.critical("%s", error)  # its words are our own, which those of a traceback need not be
                raise
        self.startup_seconds = time.time() - self.run.started_at
        self.warm = True
        self.ring.tell_warm()

    async def _drain(self, message: Drain) -> None:
        if self.draining:
            return
        self.draining = True
        if message.leave_queue:
            self.stop_accepting()
        # Health checks that wait for a sign of life have their answer: 503.
        self.pulse.wake()
        log.info("draining: %d requests in flight, at most %g s", len(self.journal), message.timeout)
        until = self.loop.time() + message.timeout
        if not await self._idle_within(message.timeout):
            log.warning("aborting %d requests that did not finish in time", len(self.journal))
            self.journal.abort(self.journal.match(None))
            await self._idle_within(_ANSWER_GRACE)
        await self.ring.answered_within(max(0.0, until - self.loop.time()))
        self.ring.fail_questions(RefusedError("D", "The server is shutting down.", 503))
        self.journal.end_all(_ABORTED)
        if not self.ended.done():
            self.ended.set_result(None)

    async def _idle_within(self, seconds: float) -> bool:
        if not len(self.journal):
            return True
        idle = asyncio.Event()
        self.journal.on_idle = idle.set
        try:
            async with asyncio.timeout(seconds):
                await idle.wait()
        except TimeoutError:
            return not len(self.journal)
        return True
