"""Broken and absurd messages, 10,000 of them, into the inbox of each process and through its handler: what is no
message is left out, what makes no sense fails by itself, and what comes afterwards is done right."""

from __future__ import annotations

import gc
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from detokenizer_proc import __main__ as detokenizer
from detokenizer_proc.steps import StepDecoder
from engine.checkpoints.tokenizer import Tokenizer, decode
from engine.checkpoints.tokenizer_data import finish_tokenizer
from engine.wire import tuning
from engine.wire.lifecycle import ToLauncher
from engine.wire.operation import SlowDown
from engine.wire.results import Finish
from engine.wire.sampling import Sampling, TextOptions
from engine.wire.sockets import Inbox, Outbox, endpoint
from engine.wire.to_detokenizer import Opened, StepOutput, ToDetokenizer
from engine.wire.to_frontend import Accepted, Ended, TextStep, ToFrontend, Tokenized
from engine.wire.to_scheduler import Admit, StopSeen, ToScheduler
from engine.wire.to_tokenizer import Embed, Generate, Judge, Tokenize, ToTokenizer
from engine.wire.weights import ContinueGeneration
from http_frontend.journal import Entry, nothing_to_do
from http_frontend.replay import replayed
from http_frontend.ring import Ring
from http_frontend.scheduler_state import StateWatch
from scheduler_proc import operation
from scheduler_proc.scheduler import Scheduler
from tests.mutations import cases, mutated, random_value, varied
from tests.scheduler_proc import simulation
from tests.tokenizer_models import byte_level
from tokenizer_proc import __main__ as tokenizer_process
from tokenizer_proc.validation import Bounds

CASES = cases(2_500)
BATCH = 25
SLOWEST = 10.0
"""Seconds that one case may take, on a machine that does other things as well."""


class Sent(list[Any]):
    def send(self, message: Any) -> None:
        msgspec.msgpack.encode(message)  # as a socket would
        self.append(message)

    def of(self, kind: Any) -> list[Any]:
        return [message for message in self if isinstance(message, kind)]


class Wire:
    """A process's inbox, and frames for it: half of them broken in their bytes, half absurd in their values.

    usual: makes a good message of the kind that matters most, from which a third of the frames come.
    """

    def __init__(
        self, folder: str, context: zmq.Context[Any], name: str, kind: Any, usual: Callable[[], Any] | None = None
    ) -> None:
        self.inbox: Inbox[Any] = Inbox(context, folder, name, kind)
        self._kind = kind
        self._usual = usual
        self._rng = random.Random(name)
        self._socket = context.socket(zmq.PUSH)
        self._socket.connect(endpoint(folder, name))

    def push(self) -> None:
        """Send a frame."""
        broken = self._rng.random() < 0.5
        if self._usual is not None and self._rng.random() < 1 / 3:
            message = varied(self._rng, self._usual())
        else:
            message = random_value(self._rng, self._kind, 0.05 if broken else 0.3)
        frame = msgspec.msgpack.encode(message)
        self._socket.send(mutated(self._rng, frame) if broken else frame)

    def messages(self) -> Iterator[Any]:
        """What of each frame is a message; fails where handling one takes too long."""
        for _ in range(CASES):
            self.push()
            assert self.inbox.wait(5)
            started = time.monotonic()
            yield from self.inbox.drain()
            assert time.monotonic() - started < SLOWEST

    def close(self) -> None:
        self._socket.close(0)
        self.inbox.close()


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Iterator[zmq.Context[Any]]:
    """What messages do to the whole process is not done to that of the tests."""
    monkeypatch.setattr(tuning, "set_level", lambda level: None)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setattr(gc, "collect", lambda: 0)
    with zmq.Context() as context:
        yield context


@pytest.fixture
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="tm") as folder:
        yield folder


@pytest.fixture(scope="module")
def vocabulary() -> Tokenizer:
    return finish_tokenizer(byte_level(), named_tokens={"bos_token": "<s>", "eos_token": "</s>"})


def test_the_tokenizer(folder: str, context: zmq.Context[Any], vocabulary: Tokenizer) -> None:
    wire = Wire(folder, context, "tokenizer", ToTokenizer, lambda: request(3))
    bounds = Bounds(vocab_size=vocabulary.vocab_size, context_length=64)
    handled = 0
    for message in wire.messages():
        frontend, scheduler = Sent(), Sent()
        tokenizer_process.handle(message, vocabulary, bounds, frontend, scheduler)
        handled += 1
        if isinstance(message, Generate | Embed | Judge):
            (answer,) = frontend
            assert (answer.key, answer.attempt) == (message.key, message.attempt)
            assert len(scheduler.of(Admit)) == len(scheduler) == isinstance(answer, Accepted)
            for admitted in scheduler:
                ids = np.frombuffer(admitted.input_ids, "<i4")
                assert len(ids) and ids.min() >= 0 and ids.max() < bounds.vocab_size
        elif isinstance(message, Tokenize):
            assert [type(answer) for answer in frontend] == [Tokenized] and not scheduler
        else:
            assert scheduler == [message] and not frontend
    assert handled > CASES / 3
    wire.close()


def test_the_scheduler(
    folder: str, context: zmq.Context[Any], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    depth = tmp_path_factory.mktemp("profiles") / "a" / "b"
    depth.mkdir(parents=True)
    monkeypatch.chdir(depth)  # profiles are written to folders like "../.."
    monkeypatch.setattr(operation.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(simulation, "Sent", Sent)
    scheduler, sent, _ = simulation.simulated_scheduler(64)
    simulation.change_settings(scheduler, vocab_size=simulation.VOCABULARY)
    wire = Wire(folder, context, "scheduler", ToScheduler, lambda: simulation.admit(3, [3, 1, 4], new=9))
    admitted = 0
    for number, message in enumerate(wire.messages()):
        before = len(sent)
        scheduler.handle(message)  # type: ignore[arg-type]
        if isinstance(message, Admit):
            admitted += message.key in scheduler.requests
            assert message.key in scheduler.requests or any(one.key == message.key for one in sent[before:])
        scheduler.turn()
        if number % BATCH == BATCH - 1:
            run_dry(scheduler)
            check_scheduler(scheduler, sent)
            sent.clear()
    assert admitted > CASES / 10
    wire.close()


def run_dry(scheduler: Scheduler) -> None:
    """Step until nothing is left: no message may leave a request that never ends."""
    scheduler.handle(ContinueGeneration(-1))
    for _ in range(3_000):
        if not scheduler.requests:
            break
        scheduler.turn()
        scheduler.planner.memory.check(scheduler.planner.running)
    assert not scheduler.requests and not scheduler.planner.waiting and not scheduler.planner.running
    scheduler.idle()


def check_scheduler(scheduler: Scheduler, sent: Any) -> None:
    sent.clear()
    scheduler.handle(SlowDown(0.0))
    scheduler.handle(simulation.admit(1 << 40, [3, 1, 4, 1, 5], new=4))
    run_dry(scheduler)
    steps = sent.of(StepOutput)
    assert [step.tokens[0] for step in steps] == simulation.expected_tokens([3, 1, 4, 1, 5], 4)


def test_the_detokenizer(folder: str, context: zmq.Context[Any], vocabulary: Tokenizer) -> None:
    wire = Wire(folder, context, "detokenizer", ToDetokenizer)
    decoder = StepDecoder(vocabulary)
    failed = 0
    for number, message in enumerate(wire.messages()):
        frontend, scheduler = Sent(), Sent()
        detokenizer.handle(message, decoder, vocabulary, vocabulary.vocab_size, frontend, scheduler)
        if isinstance(message, StepOutput):
            assert len(frontend.of(TextStep)) + len(frontend.of(Ended)) == len(frontend)
            for step in frontend.of(TextStep):
                assert len(step.keys) == len(step.attempts) == len(step.texts) == len(step.tokens)
            stopped = scheduler.of(StopSeen)
            assert len(stopped) == len(scheduler) <= 1
            assert {one.key for one in frontend.of(Ended)} <= {key for stop in stopped for key in stop.keys}
            failed += bool(frontend.of(Ended))
        if number % BATCH == BATCH - 1:
            check_detokenizer(decoder, vocabulary)
    assert failed and decoder.num_requests < 100
    wire.close()


def check_detokenizer(decoder: StepDecoder, vocabulary: Tokenizer) -> None:
    """A request among the ruins has its text."""
    ids = vocabulary.backend.encode("The quick", add_special_tokens=False).ids
    key, texts = 1 << 40, ""
    for row, token in enumerate(ids):
        opened = [Opened(key, 0, 1, 0, [1], [], TextOptions(), None)] if row == 0 else []
        finished = {0: Finish("length", length=len(ids))} if row == len(ids) - 1 else {}
        step, _ = decoder.decode(StepOutput(opened, [key], [0], [token], finished, {}, {}))
        assert step is not None
        texts += step.texts[0]
    assert texts == decode(vocabulary, ids, skip_special_tokens=True)


def test_the_frontend(folder: str, context: zmq.Context[Any]) -> None:
    ring = Ring(context, folder)
    ring.on_state = StateWatch(ring).take
    failures: list[BaseException] = []
    ring.on_failure = failures.append
    wire = Wire.__new__(Wire)  # the ring has bound the inbox
    wire._kind, wire._rng, wire._usual = ToFrontend, random.Random("frontend"), usual_step
    wire._socket = context.socket(zmq.PUSH)
    wire._socket.connect(endpoint(folder, "frontend"))
    ended = 0
    for number in range(CASES):
        for key in range(6):
            if ring.journal.entry(key) is None:
                ring.journal.submit([Entry(request(key), nothing_to_do)])
        wire.push()
        assert ring._inbox.wait(5)
        started = time.monotonic()
        ring._read()
        assert time.monotonic() - started < SLOWEST
        ended += sum(ring.journal.entry(key) is None for key in range(6))
        if number % BATCH == BATCH - 1:
            check_frontend(ring, wire._socket)
    assert not failures and ended > CASES / 20
    ring.journal.end_all(Finish("abort", message="done"))
    wire._socket.close(0)
    ring._inbox.close()
    for outbox in (ring._tokenizer, ring._detokenizer, ring._launcher):
        outbox.close(0)


def usual_step() -> TextStep:
    return TextStep([], [0, 1, 2], [0, 0, 0], ["a", "b", "c"], [5, 6, 7], {}, {}, {}, {})


def request(key: int) -> Generate:
    return Generate(
        key=key, attempt=0, rid=f"request {key}", text="a", input_ids=None, output_ids=b"", sampling=Sampling(),
        text_options=TextOptions(), logprobs=None,
    )  # fmt: skip


def check_frontend(ring: Ring, socket: zmq.Socket[bytes]) -> None:
    """A request among the ruins gets its tokens, and what is in flight can be replayed."""
    entry = Entry(request(1 << 40), nothing_to_do)
    ring.journal.submit([entry])
    finish = Finish("length", length=2)
    for row in (0, 1):
        step = TextStep([], [entry.key], [0], ["ab"[row]], [row], {0: finish} if row else {}, {}, {}, {})
        socket.send(msgspec.msgpack.encode(step))
        assert ring._inbox.wait(5)
        ring._read()
    assert (entry.texts, entry.output_ids, entry.finish) == (["a", "b"], [0, 1], finish)
    for one in ring.journal.sent():
        one.message = request(one.key)
    assert len(list(replayed(ring.journal.sent()))) == len(ring.journal.sent())


def test_the_launcher_and_what_is_logged(
    folder: str, context: zmq.Context[Any], caplog: pytest.LogCaptureFixture
) -> None:
    wire = Wire(folder, context, "launcher", ToLauncher)
    read = sum(1 for _ in wire.messages())
    left_out = [record.getMessage() for record in caplog.records if "left out a frame" in record.getMessage()]
    assert len(left_out) + read == CASES and len(left_out) > CASES / 10
    outbox: Outbox[Any] = Outbox(context, folder, "launcher")
    outbox.send({"a prompt": "nobody may read it"})
    assert wire.inbox.wait(5) and wire.inbox.drain() == []
    assert "launcher left out a frame of" in caplog.records[-1].getMessage()
    assert "prompt" not in caplog.text[-500:] and "nobody" not in caplog.text
    outbox.close(0)
    wire.close()
