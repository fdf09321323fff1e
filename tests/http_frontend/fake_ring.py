"""A fake tokenizer, scheduler and detokenizer on one thread, and a real frontend process in front of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import zmq
from fake_messages import Running, begun_of, fake_logprob, rows_of, text_of, texts_of, vectors_of

from engine.config import ModelFacts, ModelSource, RunConfig, ServerConfig, write_run_config
from engine.config.run import PooledFacts
from engine.wire.lifecycle import Drain, Limits, Lost, Ready, Serving, ToLauncher, Warm
from engine.wire.operation import Profile, Profiled
from engine.wire.results import Finish, TokenLogprobs
from engine.wire.sockets import Inbox, Outbox
from engine.wire.to_detokenizer import NO_TOKEN, Detokenize, ToDetokenizer
from engine.wire.to_frontend import (
    Accepted,
    Detokenized,
    Ended,
    ExpertsRecorded,
    Failed,
    Flushed,
    StartedOver,
    State,
    ToFrontend,
    Tokenized,
)
from engine.wire.to_scheduler import Abort, FlushCache, QueryState, RecordExperts, StartOver
from engine.wire.to_tokenizer import Embed, Generate, Judge, Tokenize, ToTokenizer
from engine.wire.weights import (
    ContinueGeneration,
    Paused,
    PauseGeneration,
    ReadWeights,
    SetWeightVersion,
    UpdateWeights,
    WeightControl,
    WeightRows,
    WeightsUpdated,
)

Question = FlushCache | QueryState | RecordExperts | WeightControl | Profile
REPOSITORY = Path(__file__).resolve().parents[2]
LIMITS = Limits(
    max_total_num_tokens=4096,
    max_req_input_len=4000,
    max_running_requests=64,
    chunked_prefill_size=512,
    weight_gb=0.1,
    kvcache_gb=0.2,
    available_gb=3.0,
    load_seconds={"model": 0.5},
)


class FakeRing:
    """Plays the other processes. `hold`: no steps are made while it is set. `silent`: nothing is answered at all.
    `broken`: the scheduler fails at every question.

    Texts (and documents) that begin with "REFUSE " are refused at the door, with "QUEUE " by the scheduler with 503,
    with "BREAK " they end in a 500 after 3 tokens, with "GARBLE " the ids of their prompts lack a byte. Everything that
    came is in `seen`. width: of the model's vectors. most_tokens: that a request gets, whatever it asks for.
    """

    def __init__(self, runtime_dir: str, step_seconds: float = 0.001, width: int = 3) -> None:
        self.width = width
        self.runtime_dir = runtime_dir
        self.context: zmq.Context[Any] = zmq.Context()
        self.tokenizer: Inbox[ToTokenizer] = Inbox(self.context, runtime_dir, "tokenizer", ToTokenizer)
        self.detokenizer: Inbox[ToDetokenizer] = Inbox(self.context, runtime_dir, "detokenizer", ToDetokenizer)
        self.launcher: Inbox[ToLauncher] = Inbox(self.context, runtime_dir, "launcher", ToLauncher)
        self.frontend: Outbox[ToFrontend] = Outbox(self.context, runtime_dir, "frontend")
        self.step_seconds = step_seconds
        self.hold = threading.Event()
        self.silent = threading.Event()
        self.broken = threading.Event()
        self.seen: list[Any] = []
        self.running: dict[int, Running] = {}
        self.weight_version = "default"
        self.state: dict[str, Any] = {"last_gen_throughput": 1.5}
        self.profiling = False
        self.most_tokens: int | None = None
        self.launcher_seen: list[ToLauncher] = []
        self.changed = threading.Condition()
        self._outgoing: list[ToFrontend] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="fake ring")
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for end in (self.tokenizer, self.detokenizer, self.launcher, self.frontend):
            end.close()
        self.context.destroy(linger=0)

    def send(self, message: ToFrontend) -> None:
        """Send from the fake ring's thread (sockets are not to be shared)."""
        self._outgoing.append(message)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        """Wait until `condition` holds; it is looked at after every round of the ring."""
        with self.changed:
            assert self.changed.wait_for(condition, seconds), "the fake ring has not seen it in time"

    def kinds(self, kind: type) -> list[Any]:
        return [message for message in self.seen if isinstance(message, kind)]

    def aborted(self) -> set[int]:
        return {key for message in self.kinds(Abort) for key in message.keys}

    def by_rid(self, rid: str) -> Generate:
        return next(message for message in self.kinds(Generate) if message.rid == rid)

    def embeds(self) -> list[Embed]:
        """The clients' requests for vectors."""
        return [message for message in self.kinds(Embed) if not message.rid.startswith(("WARM_UP", "HEALTH"))]

    def _loop(self) -> None:
        while not self._stop.is_set():
            incoming: list[Any] = [*self.tokenizer.drain(), *self.detokenizer.drain()]
            with self.changed:
                self.launcher_seen += self.launcher.drain()
                self.seen += incoming
                while self._outgoing:
                    self.frontend.send(self._outgoing.pop(0))
                if not self.silent.is_set():
                    for message in incoming:
                        self._take(message)
                    if self.running and not self.hold.is_set():
                        self._step()
                self.changed.notify_all()
            self.tokenizer.wait(self.step_seconds)

    def _take(self, message: Any) -> None:
        match message:
            case Generate() | Embed() | Judge():
                self._admit(message)
            case _ if self.broken.is_set() and isinstance(message, Question):
                self.frontend.send(Failed(message.key, "internal error: it is broken"))
            case Abort():
                gone = [key for key in message.keys if key in self.running]
                for key in gone:
                    one = self.running.pop(key)
                    finish = Finish("abort", message="Aborted" if one.made else "Abort in waiting queue")
                    if one.made:
                        self.frontend.send(rows_of([(one, "", NO_TOKEN, finish, None)], [], self.weight_version))
                    else:
                        self.frontend.send(Ended(key, one.message.attempt, finish, "scheduler"))
            case UpdateWeights() | SetWeightVersion() | ReadWeights() | PauseGeneration() | ContinueGeneration():
                self._weights(message)
            case StartOver(before):
                self.running = {key: one for key, one in self.running.items() if key >= before}
                self.frontend.send(StartedOver(before, False, self.weight_version))
            case FlushCache():
                self.frontend.send(Flushed(message.key, not self.running))
            case QueryState():
                self.frontend.send(State(message.key, self.state))
            case Profile():
                error = "cannot" if self.profiling == (message.action == "start") else None
                self.profiling = message.action == "start"
                self.frontend.send(Profiled(message.key, error))
            case RecordExperts():
                self.frontend.send(ExpertsRecorded(message.key))
            case Tokenize():
                ids = [
                    [ord(letter) for letter in prompt]
                    for prompt in message.prompts or ["".join(map(str, message.messages or []))]
                ]
                error = "the tokenizer is broken" if message.prompts == ["BREAK"] else None
                self.frontend.send(Tokenized(message.key, [] if error else ids, 8192, error))
            case Detokenize():
                self.frontend.send(Detokenized(message.key, ["".join(map(chr, row)) for row in message.ids], None))

    def _weights(self, message: WeightControl) -> None:
        """Paths that begin with "WRONG" are refused; "w" is the only tensor."""
        match message:
            case UpdateWeights(key=key, model_path=path):
                wrong = path.startswith("WRONG")
                if not wrong:
                    self.weight_version = message.weight_version or self.weight_version
                self.frontend.send(
                    WeightsUpdated(
                        key=key, success=not wrong, message="what the scheduler says", paused=message.keep_pause,
                        weight_version=self.weight_version, model_path=None if wrong else path,
                    )
                )  # fmt: skip
            case SetWeightVersion(key, version):
                self.weight_version = version
                self.frontend.send(
                    WeightsUpdated(
                        key=key, success=True, message=f"Weight version updated to {version}", paused=False,
                        weight_version=version, model_path=None,
                    )
                )  # fmt: skip
            case ReadWeights(key, name, rows):
                self.frontend.send(WeightRows(key, [[0.5, 1.0]] * rows if name == "w" else None))
            case PauseGeneration() | ContinueGeneration():
                self.frontend.send(Paused(message.key, isinstance(message, PauseGeneration)))

    def _admit(self, message: Generate | Embed | Judge) -> None:
        texts = texts_of(message)
        if texts[-1].startswith("REFUSE "):
            finish = Finish("abort", message=texts[-1].removeprefix("REFUSE "), status=400)
            self.frontend.send(Ended(message.key, message.attempt, finish, "door"))
            return
        if texts[-1].startswith("QUEUE "):
            finish = Finish("abort", message="The request queue is full.", status=503)
            self.frontend.send(Ended(message.key, message.attempt, finish, "scheduler"))
            return
        prompt: array[int] = array("i")
        if not isinstance(message, Judge) and message.input_ids is not None:
            prompt.frombytes(message.input_ids)
        else:
            prompt.extend(ord(letter) for text in texts for letter in text)
        garbled = texts[-1].startswith("GARBLE ")
        if garbled:
            prompt.append(0)
        self.frontend.send(
            Accepted(message.key, message.attempt, prompt.tobytes()[: -1 if garbled else None], time.monotonic())
        )
        made = len(message.output_ids) // 4 if isinstance(message, Generate) else 0
        self.running[message.key] = Running(message, prompt.tolist(), made)

    def _step(self) -> None:
        rows = []
        begun = []
        embeds = [one for one in self.running.values() if isinstance(one.message, Embed)]
        if embeds:
            self.frontend.send(vectors_of(embeds, self.width))
        for one in embeds:
            del self.running[one.message.key]
        for key, one in list(self.running.items()):
            generate = one.generate
            if not one.opened:
                one.opened = True
                begun.append(begun_of(one))
            limit = generate.sampling.max_new_tokens
            if self.most_tokens is not None:
                limit = min(limit or 0, self.most_tokens)
            if limit == 0:
                asked = generate.logprobs.ids if generate.logprobs else []
                scored = [(fake_logprob(one.prompt, token), token) for token in asked]
                last = TokenLogprobs(None, None, scored) if generate.logprobs else None
                rows.append((one, "", NO_TOKEN, Finish("length", length=0), last))
                del self.running[key]
                continue
            token = len(one.prompt) + one.made
            one.made += 1
            finish = Finish("length", length=limit) if one.made == limit else None
            if one.made == 3 and (generate.text or "").startswith("BREAK "):
                finish = Finish("abort", message="broken in the middle", status=500)
            logprobs = None
            if (options := generate.logprobs) is not None:
                top = [(-0.5 - i, token + i) for i in range(options.top)] if options.top else None
                ids = [(-2.5, i) for i in options.ids] if options.ids else None
                logprobs = TokenLogprobs(-0.5, top, ids)
            rows.append((one, text_of(token), token, finish, logprobs))
            if finish is not None:
                del self.running[key]
        if rows:
            self.frontend.send(rows_of(rows, begun, self.weight_version))


def run_config(
    runtime_dir: str, launcher_pid: int, *, pooled: PooledFacts | None = None, judges: bool = False, **server: Any
) -> RunConfig:
    """A configuration as the launcher would write it."""
    facts = ModelFacts(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=1000,
        context_length=4096,
        eos_ids=[2],
        pooled=pooled,
        judges=judges,
    )
    source = ModelSource(name="org/model-x", kind="folder", path="/nowhere")
    return RunConfig(
        server=ServerConfig(**server),
        model=source,
        tokenizer=source,
        facts=facts,
        runtime_dir=runtime_dir,
        launcher_pid=launcher_pid,
        launch_command="tokenmill serve",
        started_at=time.time(),
    )


class Live:
    """A frontend process on a free port, the ring it talks to, and a client."""

    def __init__(self, ring: FakeRing, process: subprocess.Popen[bytes], port: int) -> None:
        self.ring = ring
        self.process = process
        self.port = port
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20)

    def serve(self) -> None:
        """Say that all processes are ready, and wait for the warm-up."""
        self.ring.send(Serving(0, LIMITS))
        self.ring.wait_for(lambda: any(isinstance(message, Warm) for message in self.ring.launcher_seen))

    def lose(self, process: str, epoch: int, **suspicion: Any) -> None:
        """`process` dies: what it is told from now on is lost with it, and nothing more is made."""
        self.ring.silent.set()
        self.ring.send(Lost(process, epoch, **suspicion))
        while self.client.get("/health").status_code != 503:
            pass

    def replace(self, epoch: int) -> None:
        """A new process, which knows nothing, is there for the dead one."""
        self.ring.running.clear()
        self.ring.silent.clear()
        self.ring.send(Serving(epoch, LIMITS))

    def drain(self, seconds: float) -> None:
        self.ring.send(Drain(seconds))

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)


@contextmanager
def live_frontend(
    *,
    warm: bool = True,
    step_seconds: float = 0.001,
    pooled: PooledFacts | None = None,
    judges: bool = False,
    epoch: int = 0,
    stderr: Any = subprocess.PIPE,
    **server: Any,
) -> Iterator[Live]:
    """Start `python -m http_frontend` on an inherited listening socket, and end it by its pid.

    stderr: where its log goes; a pipe that nobody reads holds 64 KiB of it.
    """
    with tempfile.TemporaryDirectory(prefix="tm") as folder:
        config_path = Path(folder) / "config.json"
        run = run_config(folder, os.getpid(), pooled=pooled, judges=judges, **server)
        write_run_config(msgspec.structs.replace(run, epoch=epoch), config_path)
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        ring = FakeRing(folder, step_seconds, pooled.width if pooled else 0)
        process = subprocess.Popen(
            [sys.executable, "-m", "http_frontend", "--config", str(config_path), "--fd", str(listener.fileno())],
            cwd=REPOSITORY,
            pass_fds=(listener.fileno(),),
            stderr=stderr,
        )
        listener.close()
        live = Live(ring, process, port)
        try:
            ring.wait_for(lambda: any(isinstance(message, Ready) for message in ring.launcher_seen))
            if warm:
                live.serve()
            yield live
        finally:
            live.client.close()
            process.kill()
            process.communicate()
            ring.close()


def call(text: Any = "hello", tokens: int = 4, **fields: Any) -> dict[str, Any]:
    return {"text": text, "sampling_params": {"max_new_tokens": tokens}, **fields}


def events(response: httpx.Response) -> list[Any]:
    """The stream's JSON chunks; checks its framing."""
    assert response.headers["content-type"] == "text/event-stream"
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    assert all(part.startswith("data: ") for part in parts[:-1])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def expected(prompt: str, tokens: int) -> tuple[str, list[int]]:
    ids = list(range(len(prompt), len(prompt) + tokens))
    return "".join(map(text_of, ids)), ids
