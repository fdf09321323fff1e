"""One process of the tree, started by itself, with the test at every socket it talks to."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zmq

from engine.config import ModelFacts, ModelSource, RunConfig, ServerConfig, write_run_config
from engine.wire.lifecycle import Ready, ToLauncher
from engine.wire.sockets import Inbox, Outbox
from engine.wire.to_frontend import ToFrontend
from engine.wire.to_scheduler import ToScheduler

WAIT_SECONDS = 60.0


class Ends:
    """send: into the process. frontend, scheduler: what it has sent there, `take` one message at a time."""

    def __init__(self, context: zmq.Context[Any], runtime_dir: str, name: str) -> None:
        self._outbox: Outbox[Any] = Outbox(context, runtime_dir, name)
        self._inboxes: dict[str, Inbox[Any]] = {
            "launcher": Inbox(context, runtime_dir, "launcher", ToLauncher),
            "frontend": Inbox(context, runtime_dir, "frontend", ToFrontend),
            "scheduler": Inbox(context, runtime_dir, "scheduler", ToScheduler),
        }
        self._waiting: dict[str, list[Any]] = {where: [] for where in self._inboxes}

    def send(self, message: Any) -> None:
        self._outbox.send(message)

    def take(self, where: str) -> Any:
        """The next message to `where`. Fails when none comes."""
        waiting = self._waiting[where]
        if not waiting:
            assert self._inboxes[where].wait(WAIT_SECONDS), f"nothing was sent to {where}"
            waiting += self._inboxes[where].drain()
        return waiting.pop(0)


@contextlib.contextmanager
def running(
    package: str, name: str, tokenizer: ModelSource | None, vocab_size: int, context_length: int = 64, **server: Any
) -> Iterator[tuple[Ends, subprocess.Popen[bytes]]]:
    """Run `python -m package` until the block ends. Its sockets lie in a short path: ipc names have a length limit."""
    with tempfile.TemporaryDirectory(prefix="tm-") as runtime_dir, zmq.Context() as context:
        config = RunConfig(
            server=ServerConfig(**server),
            model=ModelSource(name="test", kind="folder", path="/nonexistent"),
            tokenizer=tokenizer,
            facts=ModelFacts(
                architectures=["LlamaForCausalLM"],
                model_type="llama",
                vocab_size=vocab_size,
                context_length=context_length,
                eos_ids=[2],
            ),
            runtime_dir=runtime_dir,
            launcher_pid=os.getpid(),
            launch_command="test",
            started_at=time.time(),
        )
        file = Path(runtime_dir) / "run.json"
        write_run_config(config, file)
        ends = Ends(context, runtime_dir, name)
        process = subprocess.Popen([sys.executable, "-m", package, "--config", str(file)])
        try:
            ready = ends.take("launcher")
            assert isinstance(ready, Ready) and (ready.process, ready.pid) == (name, process.pid)
            yield ends, process
            assert process.poll() is None, "the process died"
        finally:
            process.kill()
            process.wait()
            context.destroy(linger=0)
