"""What the launcher writes is the user's alone, even where the umask would let everybody in."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from engine.config import ModelFacts, ModelSource, RunConfig, ServerConfig, write_run_config
from engine.launcher.runtime_dir import runtime_dir
from engine.wire.sockets import Inbox
from engine.wire.to_scheduler import ToScheduler


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def config(folder: Path) -> RunConfig:
    source = ModelSource(name="m", kind="folder", path="/m")
    facts = ModelFacts(architectures=["X"], model_type=None, vocab_size=10, context_length=10, eos_ids=[])
    return RunConfig(
        server=ServerConfig(api_key="secret"), model=source, tokenizer=None, facts=facts, runtime_dir=str(folder),
        launcher_pid=1, launch_command="", started_at=time.time(),
    )  # fmt: skip


@pytest.mark.usefixtures("open_umask")
def test_the_runtime_folder_and_all_in_it() -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    with runtime_dir() as folder, zmq.Context() as context:
        assert mode(folder) == 0o700
        assert mode(folder / "lock") == 0o600
        path = folder / "config.json"
        write_run_config(config(folder), path)
        assert mode(path) == 0o600
        inbox: Inbox[ToScheduler] = Inbox(context, str(folder), "scheduler", ToScheduler)
        # A socket's own mode is what the umask leaves of it: the folder is what keeps others away.
        assert (folder / "scheduler.sock").is_socket()
        inbox.close()
