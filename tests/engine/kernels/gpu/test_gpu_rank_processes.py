"""`--device cuda --tp-size 2` with all its processes, on two GPUs (`-m gpu`), or where Triton's interpreter stands in
for them and gloo for NCCL: that is all that is different then."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from live_client import Api
from tiny_models import tiny_llama

from engine.bench.live_server import LiveServer, running_server
from engine.config import ModelFacts, ModelSource, RunConfig, ServerConfig
from engine.kernels.queued import QueueingProgram
from engine.launcher.children import child_environment
from scheduler_proc.gpus import Gpus
from scheduler_proc.load import MAX_RUNNING, load_engine
from scheduler_proc.start import bounds

HERE = Path(__file__).resolve().parent
TREE = str(HERE / "interpreted_tree.py")
FLAGS = ("--dtype", "float32", "--max-total-tokens", "400", "--skip-tokenizer-init")
PAIR = ("--device", "cuda", "--tp-size", "2")
TOKENS, CONTEXT = 8, 200
PATIENCE = 100.0
Words = tuple[str, ...]


@pytest.fixture(scope="module", params=["interpreter", pytest.param("gpus", marks=pytest.mark.gpu)])
def program(request: pytest.FixtureRequest) -> Words:
    """What Python runs as `tokenmill serve`."""
    if request.param == "interpreter":
        if request.config.option.markexpr == "gpu":
            pytest.skip("this process runs the kernels elsewhere")
        return (TREE,)
    if torch.cuda.device_count() < 2:
        pytest.skip(f"two GPUs are wanted, and torch sees {torch.cuda.device_count()}")
    return ("-m", "engine", "serve")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank has two of its three groups of heads."""
    return tiny_llama(tmp_path_factory.mktemp("ranks") / "model", num_hidden_layers=1, max_position_embeddings=CONTEXT)


def environment(program: Words) -> dict[str, str]:
    paths = [str(HERE), child_environment().get("PYTHONPATH", "")]
    strict = {"TOKENMILL_STRICT": "1", "HF_HUB_OFFLINE": "1"}
    return strict | ({"PYTHONPATH": os.pathsep.join(paths)} if program == (TREE,) else {})


def serving(program: Words, model: Path, *flags: str) -> AbstractContextManager[LiveServer]:
    return running_server(*FLAGS, *PAIR, *flags, model=model, program=program, env=environment(program))


@pytest.fixture(scope="module")
def pair(program: Words, model: Path) -> Iterator[LiveServer]:
    with serving(program, model, "--watchdog-timeout", "6", "--max-restarts", "1000") as server:
        yield server


@pytest.fixture(scope="module")
def expected(model: Path) -> list[Any]:
    """By one rank on a CPU."""
    with running_server(*FLAGS, "--device", "cpu", model=model) as server:
        return answers(server)


def bodies() -> list[Any]:
    kinds: list[Any] = [
        {"temperature": 0}, {"temperature": 1.0, "top_k": 4, "sampling_seed": 3}, {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 0, "frequency_penalty": 1.5}, {"temperature": 1.2},
    ]  # fmt: skip
    return [
        {
            "input_ids": list(range(5 + number, 12 + 9 * number)),
            "sampling_params": {"max_new_tokens": TOKENS, "ignore_eos": True, "sampling_seed": number, **kind},
        }
        for number, kind in enumerate(kinds)
    ]


def answers(server: LiveServer) -> list[Any]:
    together = {name: [body[name] for body in bodies()] for name in ("input_ids", "sampling_params")}
    return [answer["output_ids"] for answer in Api(server.url).generate(**together)]


def pid_of_rank(launcher: int, rank: int) -> int | None:
    for child in psutil.Process(launcher).children():
        try:
            words, running = child.cmdline(), child.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            continue
        if running and words and words[0].startswith(f"tokenmill: scheduler tp{rank}"):
            return child.pid
    return None


def test_answers_are_those_of_one_rank_and_depend_on_nobody_beside(pair: LiveServer, expected: list[Any]) -> None:
    info = Api(pair.url).http.get("/server_info").json()
    assert (info["device"], info["internal_states"][0]["world_size"]) == ("cuda", 2)
    assert answers(pair) == expected
    body = bodies()[0] | {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
    alone = Api(pair.url).generate(**body)
    assert alone["output_ids"] == expected[0]
    several = Api(pair.url).generate(
        input_ids=[body["input_ids"], [7, 8, 9]], sampling_params=body["sampling_params"], return_logprob=True,
        logprob_start_len=0, top_logprobs_num=2,
    )  # fmt: skip
    for name in ("input_token_logprobs", "output_token_logprobs", "output_top_logprobs"):
        assert several[0]["meta_info"][name] == alone["meta_info"][name]


@pytest.mark.parametrize(
    ("rank", "number"),
    [
        (1, signal.SIGKILL),
        pytest.param(0, signal.SIGKILL, marks=[pytest.mark.slow, pytest.mark.ci]),
        pytest.param(0, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_dies_takes_its_group_and_no_request(
    pair: LiveServer, expected: list[Any], rank: int, number: signal.Signals
) -> None:
    with Api(pair.url).open_stream(**bodies()[1]) as chunks:
        for _ in range(3):
            last = next(chunks)
        before = [pid_of_rank(pair.launcher.pid, one) for one in (0, 1)]
        pid = before[rank]
        assert pid is not None and last["meta_info"]["finish_reason"] is None
        os.kill(pid, number)
        for chunk in chunks:
            last = chunk
    assert last["output_ids"] == expected[1]
    after = [pid_of_rank(pair.launcher.pid, one) for one in (0, 1)]
    assert None not in after and not set(before) & set(after), pair.log()
    assert answers(pair) == expected


@contextmanager
def second_machine(program: Words, model: Path, log: Path, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    words = [sys.executable, "-P", *program, str(model), *FLAGS, *PAIR, *flags]
    with log.open("wb") as file:
        launcher = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env=child_environment() | environment(program)
        )
    try:
        yield launcher
    finally:
        launcher.terminate()
        launcher.wait(30)


@pytest.mark.slow
def test_two_machines(program: Words, model: Path, expected: list[Any], tmp_path: Path) -> None:
    """Two launchers, of which the second one takes the second GPU, and what the death of a rank does to both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags, log = ("--nnodes", "2", "--dist-init-addr", address), tmp_path / "log"
    with (
        second_machine(program, model, log, *flags, "--node-rank", "1", "--base-gpu-id", "1") as second,
        serving(program, model, *flags) as server,
    ):
        assert answers(server) == expected, log.read_text()
        for launcher, rank in ((second.pid, 1), (server.launcher.pid, 0)):
            pid = pid_of_rank(launcher, rank)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            assert answers(server) == expected, log.read_text()
        api, until = Api(server.url), time.monotonic() + PATIENCE
        while api.http.get("/health").status_code != 200:
            assert time.monotonic() < until, server.log()
            time.sleep(0.1)


def test_the_first_rank_may_hand_out_steps_as_long_as_a_gpus(model: Path, device: torch.device) -> None:
    """What it holds a step to is no less than what the planner may plan."""
    source = ModelSource(name=str(model), kind="folder", path=str(model))
    facts = ModelFacts(architectures=[], model_type=None, vocab_size=420, context_length=CONTEXT, eos_ids=[])
    run = RunConfig(
        server=ServerConfig(device="cuda", dtype="float32", max_total_tokens=300), model=source, tokenizer=None,
        facts=facts, runtime_dir="", launcher_pid=0, launch_command="", started_at=0.0,
    )  # fmt: skip
    engine = load_engine(run, started=time.monotonic(), gpus=Gpus("cuda" if device.type == "cuda" else "cpu", "gloo"))
    gc.unfreeze()  # a server's process is not to end soon, and this one is
    assert isinstance(engine.program, QueueingProgram)
    assert engine.limits.max_total_num_tokens == 300
    assert bounds(run, engine).tokens == engine.limits.chunked_prefill_size + MAX_RUNNING
