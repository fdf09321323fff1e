"""CPU time of the HTTP frontend per streamed token, with a fake ring behind it and raw sockets in front.

    python scripts/frontend_cost.py [--streams 32] [--tokens 256] [--incremental] [--logprobs] [--metrics]

Every step yields one token a stream and comes `--pace` milliseconds after the last, as a model's would; the time
is user + system time of the frontend process alone, divided by the tokens that its clients have read.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import zmq

from engine.config import ModelFacts, ModelSource, RunConfig, ServerConfig, write_run_config
from engine.wire.lifecycle import Limits, Serving, ToLauncher
from engine.wire.results import Finish, TokenLogprobs
from engine.wire.sockets import Inbox, Outbox
from engine.wire.to_frontend import Accepted, Begun, TextStep, ToFrontend
from engine.wire.to_tokenizer import Generate, ToTokenizer

LIMITS = Limits(
    max_total_num_tokens=10**6,
    max_req_input_len=10**5,
    max_running_requests=256,
    chunked_prefill_size=512,
    weight_gb=0.0,
    kvcache_gb=0.0,
    available_gb=0.0,
    load_seconds={},
)


def configuration(folder: str, incremental: bool, metrics: bool) -> RunConfig:
    """A launch without warm-up and access log."""
    source = ModelSource(name="model", kind="folder", path=folder)
    facts = ModelFacts(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=50000,
        context_length=100000,
        eos_ids=[2],
    )
    server = ServerConfig(
        skip_server_warmup=True, log_level="warning", incremental_streaming_output=incremental, enable_metrics=metrics
    )
    return RunConfig(
        server=server,
        model=source,
        tokenizer=source,
        facts=facts,
        runtime_dir=folder,
        launcher_pid=os.getpid(),
        launch_command="",
        started_at=time.time(),
    )


def request(tokens: int, logprobs: bool) -> bytes:
    """One streaming call as bytes."""
    body = json.dumps(
        {
            "text": "x" * 100,
            "stream": True,
            "return_logprob": logprobs,
            "sampling_params": {"max_new_tokens": tokens, "temperature": 0},
        }
    ).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Clients:
    """Raw sockets that count the events they read."""

    def __init__(self, port: int, count: int) -> None:
        self.sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
        self.poll = select.poll()
        self.by_fd = {one.fileno(): one for one in self.sockets}
        for one in self.sockets:
            self.poll.register(one, select.POLLIN)
        self.events = 0
        self.bytes = 0

    def read(self, seconds: float) -> None:
        """Read whatever comes within `seconds`."""
        for fd, _ in self.poll.poll(seconds * 1000):
            data = self.by_fd[fd].recv(1 << 20)
            self.events += data.count(b"data: {")
            self.bytes += len(data)


def run(streams: int, tokens: int, pace: float, incremental: bool, logprobs: bool, metrics: bool) -> dict[str, Any]:
    """Measure one setting. Returns microseconds per token and bytes per token."""
    with tempfile.TemporaryDirectory(prefix="tm") as folder, zmq.Context() as context:
        config_path = Path(folder) / "config.json"
        write_run_config(configuration(folder, incremental, metrics), config_path)
        inbox: Inbox[ToTokenizer] = Inbox(context, folder, "tokenizer", ToTokenizer)
        frontend: Outbox[ToFrontend] = Outbox(context, folder, "frontend")
        launcher: Inbox[ToLauncher] = Inbox(context, folder, "launcher", ToLauncher)
        listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        process = subprocess.Popen(
            [sys.executable, "-m", "http_frontend", "--config", str(config_path), "--fd", str(listener.fileno())],
            pass_fds=(listener.fileno(),),
        )
        try:
            frontend.send(Serving(0, LIMITS))
            clients = Clients(listener.getsockname()[1], streams)
            listener.close()
            for one in clients.sockets:
                one.sendall(request(tokens, logprobs))
            keys: list[int] = []
            while len(keys) < streams:
                inbox.wait(1)
                keys += [message.key for message in inbox.drain() if isinstance(message, Generate)]
            return stream(process.pid, frontend, clients, keys, tokens, pace, logprobs)
        finally:
            process.kill()
            process.wait()
            inbox.close()
            launcher.close()
            frontend.close(0)


def stream(
    pid: int, frontend: Outbox[ToFrontend], clients: Clients, keys: list[int], tokens: int, pace: float, logprobs: bool
) -> dict[str, Any]:
    """Send the steps, read the chunks, and weigh the frontend's CPU time."""
    for key in keys:
        frontend.send(Accepted(key, 0, b"\0\0\0\0" * 100))
    time.sleep(0.2)
    watched = psutil.Process(pid)
    before = watched.cpu_times()
    rows = range(len(keys))
    due = time.perf_counter()
    for step in range(tokens):
        last = step == tokens - 1
        frontend.send(
            TextStep(
                begun=[Begun(key, 0, 100, 0, None, None) for key in keys] if step == 0 else [],
                keys=keys,
                attempts=[0] * len(keys),
                texts=[" word"] * len(keys),
                tokens=[12345] * len(keys),
                finished={row: Finish("length", length=tokens) for row in rows} if last else {},
                logprobs={row: TokenLogprobs(-0.123456) for row in rows} if logprobs else {},
                logprob_texts={},
                retracted={},
            )
        )
        due += pace
        while (left := due - time.perf_counter()) > 0:
            clients.read(left)
    for _ in range(20):
        clients.read(0.05)
    after = watched.cpu_times()
    expected = tokens * len(keys)
    spent = (after.user - before.user) + (after.system - before.system)
    return {
        "chunks": clients.events,
        "tokens": expected,
        "user_us_per_token": round((after.user - before.user) / expected * 1e6, 1),
        "system_us_per_token": round((after.system - before.system) / expected * 1e6, 1),
        "us_per_token": round(spent / expected * 1e6, 1),
        "bytes_per_token": round(clients.bytes / expected),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--pace", type=float, default=10.0, help="milliseconds between steps")
    parser.add_argument("--incremental", action="store_true")
    parser.add_argument("--logprobs", action="store_true")
    parser.add_argument("--metrics", action="store_true")
    words = parser.parse_args()
    print(
        json.dumps(
            run(words.streams, words.tokens, words.pace / 1000, words.incremental, words.logprobs, words.metrics)
        )
    )


if __name__ == "__main__":
    main()
