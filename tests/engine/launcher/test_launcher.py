"""The launcher over processes that only play their part: readiness, draining, deaths, and what is left behind."""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from engine.config import read_run_config
from engine.launcher import tree
from engine.launcher.listen import open_listener, url_of

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
PATIENCE = 60.0
CHECKPOINT = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "eos_token_id": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip


class Launch:
    """A launcher under test, and all that it and its children have said."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.said = ""

    def hear(self, text: str) -> None:
        """Read on until `text` has been said."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + PATIENCE
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while text not in self.said:
                assert selector.select(max(0.0, deadline - time.monotonic())), f"no {text!r} in:\n{self.said}"
                chunk = os.read(self.process.stdout.fileno(), 1 << 16)
                assert chunk, f"ended without {text!r}:\n{self.said}"
                self.said += chunk.decode()

    def hear_ready(self) -> None:
        self.hear("  the frontend: pid ")
        self.hear("  the detokenizer: pid ")

    def pids(self) -> dict[str, int]:
        """By title, as the launcher has printed them."""
        return {title: int(pid) for title, pid in re.findall(r"^  (.+): pid (\d+)$", self.said, re.MULTILINE)}

    def ends(self) -> int:
        """Wait for the launcher's end; returns its exit code. None of its children may outlive it."""
        children = psutil.Process(self.process.pid).children()
        self.said += self.process.communicate(timeout=PATIENCE)[0].decode()
        assert not [child for child in children if child.is_running()]
        return self.process.returncode


Start = Callable[..., AbstractContextManager[Launch]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start a launcher in a folder in which a folder named `engine` lies that must not be imported."""
    work, sockets, model = (tmp_path / name for name in ("work", "s", "model"))
    for folder in (work / "engine", sockets, model):
        folder.mkdir(parents=True)
    (work / "engine" / "__init__.py").write_text("raise SystemExit('imported from the working folder')")
    (model / "config.json").write_text(json.dumps(CHECKPOINT))

    @contextmanager
    def run(env: dict[str, str] | None = None, config: dict[str, Any] | None = None, **wish: Any) -> Iterator[Launch]:
        settings = {"model_path": str(model), "skip_tokenizer_init": True, "port": 0, "drain_timeout": 33.0}
        process = subprocess.Popen(
            [sys.executable, str(HERE / "fake_tree.py"), json.dumps({"config": settings | (config or {}), **wish})],
            cwd=work, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": f"{REPOSITORY}:{HERE}", "XDG_RUNTIME_DIR": str(sockets)} | (env or {}),
        )  # fmt: skip
        family = [psutil.Process(process.pid)]
        try:
            yield Launch(process)
        finally:
            if process.poll() is None:
                family += family[0].children()
            for member in family:
                if member.is_running() and member.status() != psutil.STATUS_ZOMBIE:
                    member.kill()
            process.communicate()
        # Nothing is left, neither of a good end nor of a bad one, but after a SIGKILL of the launcher itself.
        assert process.returncode == -signal.SIGKILL or not list(sockets.iterdir())

    return run


def test_ready_then_drained_by_a_signal(start: Start, tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        with start() as launch:
            launch.hear_ready()
            pids = launch.pids()
            assert pids.keys() == {"launcher", "the scheduler", "the tokenizer", "the detokenizer", "the frontend"}
            assert "a warning" in launch.said
            assert "serving epoch 0 with 1000 tokens" in launch.said
            assert (
                "max_total_num_tokens=1000, chunked_prefill_size=512, max_prefill_tokens=16384, "
                "max_running_requests=3, context_len=128" in launch.said
            )
            assert "The server is fired up and ready to roll!" in launch.said
            url = re.search(r"^Tokenmill serves .* on http://127.0.0.1:(\d+)$", launch.said, re.MULTILINE)
            assert url is not None
            socket.create_connection(("127.0.0.1", int(url[1])), timeout=5).close()
            (folder,) = (tmp_path / "s").iterdir()
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert stat.S_IMODE((folder / "config.json").stat().st_mode) == 0o600
            run = read_run_config(folder / "config.json")
            assert (run.launcher_pid, run.server.port, run.launch_command) == (
                pids["launcher"],
                int(url[1]),
                "as typed",
            )
            titles = {psutil.Process(pid).cmdline()[0] for pid in pids.values()}
            assert titles == {f"tokenmill: {title.removeprefix('the ')}" for title in pids}
            assert len({os.getsid(pid) for pid in pids.values()}) == 5  # Ctrl-C reaches the launcher alone
            launch.process.send_signal(number)
            assert launch.ends() == 0
            assert "draining for 33 s" in launch.said


def test_children_inherit_nothing_they_do_not_need(start: Start) -> None:
    with start() as launch:
        launch.hear_ready()
        launch.process.terminate()
        launch.ends()
    for name in ("scheduler", "tokenizer", "detokenizer"):
        assert f"{name} has /dev/null, pipe, pipe\n" in launch.said
    assert "frontend has /dev/null, pipe, pipe, listener\n" in launch.said


def test_a_second_signal_ends_at_once(start: Start) -> None:
    with start(manners={"frontend": "holds", "scheduler": "stays"}) as launch:
        launch.hear_ready()
        launch.process.terminate()
        launch.hear("draining for 33 s")
        launch.process.send_signal(signal.SIGINT)
        assert launch.ends() == 0
        assert "SIGINT again: ending at once" in launch.said
        assert "requests in flight are cut off" not in launch.said


def test_requests_that_outlast_the_drain_are_cut_off(start: Start) -> None:
    with start(manners={"frontend": "holds"}, config={"drain_timeout": 0.0}, drain_margin=0.2) as launch:
        launch.hear_ready()
        launch.process.terminate()
        assert launch.ends() == 0
        assert "requests in flight are cut off" in launch.said


@pytest.mark.parametrize("name", ["SGL_FORCE_SHUTDOWN", "TOKENMILL_FORCE_SHUTDOWN"])
def test_a_forced_shutdown_does_not_drain(start: Start, name: str) -> None:
    with start(env={name: "1"}) as launch:
        launch.hear_ready()
        launch.process.terminate()
        assert launch.ends() == 0
        assert "draining" not in launch.said


def test_a_signal_while_loading_ends_at_once(start: Start) -> None:
    with start(manners={"scheduler": "loads"}) as launch:
        launch.hear("still loading")
        launch.process.send_signal(signal.SIGINT)
        assert launch.ends() == 0
        assert "Tokenmill serves" not in launch.said


def test_a_child_that_ignores_sigterm_is_killed(start: Start) -> None:
    with start(manners={"tokenizer": "stays"}, end_grace=0.2) as launch:
        launch.hear_ready()
        launch.process.terminate()
        assert launch.ends() == 0
        assert f"the tokenizer (pid {launch.pids()['the tokenizer']}) does not end: killing it" in launch.said


def test_a_child_that_fails_to_load_ends_the_server_with_its_last_lines(start: Start) -> None:
    with start(manners={"scheduler": "crashes"}) as launch:
        assert launch.ends() == 1
        message = re.search(r"^error: the scheduler \(pid \d+\) exited with code 3; (.|\n)*", launch.said, re.MULTILINE)
        assert message is not None
        shown = [int(number) for number in re.findall(r"    line (\d+) of the trouble", message[0])]
        assert shown == list(range(10, 40))


def test_a_killed_launcher_leaves_no_process_and_the_next_one_its_folder(start: Start, tmp_path: Path) -> None:
    with start() as launch:
        launch.hear_ready()
        children = [psutil.Process(pid) for title, pid in launch.pids().items() if title != "launcher"]
        launch.process.kill()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
    (abandoned,) = (tmp_path / "s").iterdir()
    with start() as launch:
        launch.hear_ready()
        assert not abandoned.exists()
        launch.process.terminate()
        assert launch.ends() == 0


def test_a_port_in_use_is_said(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with start(config={"port": port}) as launch:
            assert launch.ends() == 1
            assert f"port {port} of 127.0.0.1 is in use" in launch.said


def test_a_setting_that_does_not_fit_the_model_is_refused(start: Start) -> None:
    with start(config={"context_length": 129}) as launch:
        assert launch.ends() == 2
        assert "argument --context-length: 129 is more than the 128 tokens" in launch.said
    with start(env={"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}, config={"context_length": 129}) as launch:
        launch.hear("context_len=129")
        assert "answers may be wrong" in launch.said
        launch.process.terminate()
        assert launch.ends() == 0


@pytest.mark.parametrize("name", ["SGL_FORCE_SHUTDOWN", "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"])
def test_a_word_in_the_environment_that_is_no_switch_is_said_at_start(start: Start, name: str) -> None:
    with start(env={name: "maybe"}, config={"context_length": 129} if "CONTEXT" in name else {}) as launch:
        assert launch.ends() == 2
        assert f"environment variable {name}: 'maybe' is neither true nor false" in launch.said
        assert "Traceback" not in launch.said


def test_a_load_format_that_the_model_does_not_have_is_refused(start: Start, tmp_path: Path) -> None:
    with start(config={"load_format": "gguf"}) as launch:
        assert launch.ends() == 2
        assert f"argument --load-format: 'gguf': {tmp_path / 'model'} is read as safetensors" in launch.said


def test_output_that_cannot_be_written_does_not_end_the_server() -> None:
    """A terminal that is closed under a server answers EIO; a stream that was closed from the start is None."""
    terminal, shown = os.openpty()
    stream = os.fdopen(shown, "w")
    os.close(terminal)
    tree.write(stream, b"nobody reads this\n")
    with pytest.raises(OSError):  # so it is still in the buffer, and was not taken
        stream.close()
    tree.write(None, b"nor this\n")


@pytest.mark.parametrize("first", [socket.AF_INET, socket.AF_INET6])
def test_a_name_of_both_families_is_served_on_ipv4(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: sorted(found, key=lambda one: one[0] != first))
    with open_listener("localhost", 0) as listener:
        assert url_of(listener, tls=False).startswith("http://127.0.0.1:")


def test_a_model_that_is_not_there_is_said(start: Start) -> None:
    with start(config={"model_path": "/nowhere/at/all"}) as launch:
        assert launch.ends() == 1
        assert "/nowhere/at/all" in launch.said
        assert "Traceback" not in launch.said


def test_what_the_settings_left_open_is_decided(start: Start, tmp_path: Path) -> None:
    with start(config={"schedule_policy": "lof", "dtype": "half", "max_prefill_tokens": 5}) as launch:
        launch.hear_ready()
        (folder,) = (tmp_path / "s").iterdir()
        run = read_run_config(folder / "config.json")
        launch.process.terminate()
        launch.ends()
    model = str(tmp_path / "model")
    left_open = {name for name, value in msgspec.structs.asdict(run.server).items() if value is None}
    assert not left_open & {"model_path", "context_length", "random_seed", "cpu_threads", "page_size", "log_level_http"}
    assert (run.model.name, run.server.tokenizer_path, run.server.served_model_name) == (model, model, model)
    assert (run.server.schedule_policy, run.server.dtype, run.server.device) == ("fcfs", "float16", "cpu")
    assert run.server.max_prefill_tokens == run.facts.context_length == 128
    assert (run.facts.architectures, run.facts.model_type) == (["LlamaForCausalLM"], "llama")
    assert (run.facts.vocab_size, run.facts.eos_ids, run.tokenizer) == (100, [2], None)
