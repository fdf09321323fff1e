"""Many clients at once against a server of default limits: is everyone answered or refused, and how is health?

python -m scripts.overload [--clients 2000] [--tokens 8] [--prompt-words 20] [--streams 0] [-- FLAGS OF THE SERVER]

Every client opens a connection of its own and asks for one completion, every other one as a stream; all begin at the
same moment. Meanwhile two other processes (`overload_clients.py`), each with nothing else to do, ask for /health and
for one more completion again and again on new connections, --streams streams that have begun before go on, and the
memory of the server's tree and the CPU time of its processes are read. Exits with 1 when a client has hung or an answer
is neither a completion nor a refusal.

A machine's cores are shared by the server and its clients: "late" says how much later than asked for each client
process itself woke, which is the machine's part of what it has measured; and the CPU time that the frontend has used
while a probe was under way is the server's part of it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import msgspec
import psutil

from engine.bench.live_server import LiveServer, running_server
from scripts.overload_clients import Seen

_STREAM_TOKENS = 400
_READ_MEMORY = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description="Overload a server and count what becomes of its clients.")
    parser.add_argument("--clients", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--prompt-words", type=int, default=20)
    parser.add_argument("--streams", type=int, default=0, help="streams that have begun before the rush comes")
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:at])
    with running_server(*words[at + 1 :]) as server:
        rush = _overload(server, options)
    good = sum(count for what, count in rush.answers.items() if what in ("answered", "refused 503"))
    sys.exit(0 if good == options.clients else 1)


def _overload(server: LiveServer, options: argparse.Namespace) -> Seen:
    """Overload `server`, print what was seen, and return what the rush has seen."""
    sizes = ["--clients", options.clients, "--tokens", options.tokens, "--prompt-words", options.prompt_words]
    frontend = ["--pid", server.pids["frontend"]]
    steady = ["--clients", options.streams, "--tokens", _STREAM_TOKENS]
    with (
        _client("rush", server, *sizes) as rush,
        _client("health", server, *frontend) as health,
        _client("refusals", server, *frontend) as refusals,
        _client("streams", server, *steady) as streams,
        _Memory(server) as memory,
    ):
        idle = memory.most
        for client in (streams, health) if options.streams else (health,):
            _begin(client)
        time.sleep(1.0)
        before, began = _cpu(server), perf_counter()
        _begin(rush)
        _begin(refusals)
        seen = _end(rush)
        seconds, after = perf_counter() - began, _cpu(server)
        health_seen, refusals_seen = _end(health), _end(refusals)
        streams_seen = _end(streams) if options.streams else Seen()
    print(f"{options.clients} clients, {seconds:.1f} s: {seen.answers}")
    print(f"refused, as the rush sees it: {_spread(seen.seconds)}; late: {_spread(seen.late)}")
    print(f"refused, beside the rush: {_spread(refusals_seen.seconds)}; late: {_spread(refusals_seen.late)}")
    print(f"  CPU time of the frontend meanwhile: {_spread(refusals_seen.computed)}")
    print(f"/health: {health_seen.answers}, {_spread(health_seen.seconds)}; late: {_spread(health_seen.late)}")
    print(f"  CPU time of the frontend meanwhile: {_spread(health_seen.computed)}")
    if options.streams:
        print(f"streams: {streams_seen.answers}, gaps: {_spread(streams_seen.seconds)}")
    print(f"memory of the tree: {idle / 1e6:.0f} MB idle, {memory.most / 1e6:.0f} MB at most")
    used = {title: round(after[title] - before[title], 2) for title in before}
    print(f"CPU seconds: {used}")
    return seen


@contextmanager
def _client(role: str, server: LiveServer, *words: object) -> Iterator[subprocess.Popen[str]]:
    """A process of clients that is ready to begin."""
    command = [sys.executable, "-m", "scripts.overload_clients", role, server.url, *map(str, words)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"the {role} clients did not start")
        yield process
    finally:
        process.kill()
        process.communicate()


def _begin(client: subprocess.Popen[str]) -> None:
    assert client.stdin is not None
    client.stdin.write("\n")
    client.stdin.flush()


def _end(client: subprocess.Popen[str]) -> Seen:
    """What a client has seen; a probe is told to end, the others are waited for."""
    assert client.stdin is not None and client.stdout is not None
    client.stdin.close()
    client.stdin = None  # communicate() would flush it
    said = client.stdout.read()
    if client.wait():
        raise RuntimeError(f"{client.args!r} has ended with {client.returncode} after {said[-200:]!r}")
    return msgspec.json.decode(said, type=Seen)


class _Memory:
    """The most memory that the tree has had."""

    def __init__(self, server: LiveServer) -> None:
        self._processes = [psutil.Process(pid) for pid in server.pids.values()]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.most = self._now()

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()

    def _now(self) -> int:
        return sum(process.memory_info().rss for process in self._processes)

    def _watch(self) -> None:
        while not self._over.wait(_READ_MEMORY):
            self.most = max(self.most, self._now())


def _cpu(server: LiveServer) -> dict[str, float]:
    """CPU seconds that each process has used so far."""
    times = {title: psutil.Process(pid).cpu_times() for title, pid in server.pids.items()}
    return {title: time.user + time.system for title, time in times.items()}


def _spread(seconds: list[float]) -> str:
    if not seconds:
        return "none"
    ordered = sorted(seconds)
    p50, p99 = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return f"{len(ordered)} times, p50 {1000 * p50:.0f} ms, p99 {1000 * p99:.0f} ms, worst {1000 * ordered[-1]:.0f} ms"


if __name__ == "__main__":
    main()
