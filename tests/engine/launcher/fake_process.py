"""Plays one process of the tree: `python -m fake_process --config FILE --play NAME --manner MANNER [--fd N]`.

Manners: good; loads (is never ready); crashes (while loading, with 40 lines on stderr); holds (answers a drain with
nothing); stays (ignores SIGTERM); faults (reads a bad address at SIGUSR1); dies (soon after it is ready, but
for its first life); unborn (dies before it is ready, in its second life).
"""

from __future__ import annotations

import argparse
import ctypes
import signal
import sys
import time
from pathlib import Path

import zmq

from engine.config import RunConfig
from engine.wire.board import Heart
from engine.wire.lifecycle import Drain, FromLauncher, GiveUp, Limits, Lost, Serving, ToLauncher, Warm
from engine.wire.process import begin, report_ready
from engine.wire.sockets import Inbox, Outbox

LIMITS = Limits(
    max_total_num_tokens=1000,
    max_req_input_len=94,
    max_running_requests=3,
    chunked_prefill_size=512,
    weight_gb=0.1,
    kvcache_gb=0.2,
    available_gb=0.3,
    load_seconds={},
)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    parser.add_argument("--play")
    parser.add_argument("--manner")
    parser.add_argument("--fd", type=int)
    words = parser.parse_args()
    say(f"{words.play} has {describe_descriptors(words.fd)}")
    config = begin(words.config, words.play)
    if words.manner == "crashes":
        for number in range(40):
            say(f"line {number} of the trouble")
        sys.exit(3)
    if words.manner == "unborn" and config.epoch == 1:
        sys.exit(5)
    if words.manner == "stays":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if words.manner == "faults":
        signal.signal(signal.SIGUSR1, lambda *_: ctypes.string_at(0))
    if words.manner == "loads":
        say("still loading")
        signal.pause()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    inbox: Inbox[FromLauncher] = Inbox(context, config.runtime_dir, words.play, FromLauncher)
    heart = Heart(config.runtime_dir, words.play)
    report_ready(context, config, words.play, LIMITS if words.play == "scheduler" else None)
    if words.play == "frontend":
        play_frontend(config, context, inbox, words.manner, heart)
    if words.manner == "dies" and config.epoch:
        sys.exit(7)
    while True:
        heart.beat()
        time.sleep(0.05)


def play_frontend(
    config: RunConfig, context: zmq.Context[zmq.Socket[bytes]], inbox: Inbox[FromLauncher], manner: str, heart: Heart
) -> None:
    launcher: Outbox[ToLauncher] = Outbox(context, config.runtime_dir, "launcher")
    while True:
        heart.beat()
        inbox.wait(0.05)
        for message in inbox.drain():
            match message:
                case Serving(epoch, limits):
                    say(f"serving epoch {epoch} with {limits.max_total_num_tokens} tokens")
                    launcher.send(Warm())
                case Lost(process, epoch, suspect, certain, computed, loaded):
                    blame = f"suspect {suspect}, certain {certain}, computed {computed}, loaded {loaded}"
                    say(f"lost the {process} in epoch {epoch}, {blame}")
                case GiveUp(text):
                    say(f"told: {text}")
                    sys.exit(0)
                case Drain(timeout):
                    say(f"draining for {timeout:g} s")
                    if manner != "holds":
                        sys.exit(0)


def describe_descriptors(listener: int | None) -> str:
    """What this process has inherited: `0 1 2` and the listening socket."""
    kinds = []
    for entry in sorted(Path("/proc/self/fd").iterdir(), key=lambda entry: int(entry.name)):
        try:
            target = str(entry.readlink())
        except FileNotFoundError:  # the descriptor that listed the folder
            continue
        kinds.append(
            "listener" if int(entry.name) == listener and target.startswith("socket:") else target.split(":")[0]
        )
    return ", ".join(kinds)


if __name__ == "__main__":
    main()
