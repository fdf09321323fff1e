"""Run a soak and print what it came to; exit code 1 when anything was not as it must be."""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator

import msgspec
import psutil

from engine.bench.http_client import parse_url, run
from engine.bench.live_server import LiveServer, running_server
from scripts.soak.clients import Clients
from scripts.soak.ledger import SHOWN, Ledger
from scripts.soak.operator import kill_on_and_on, operate
from scripts.soak.quiet import Quiet
from scripts.soak.table import BODY_LIMIT, Job, encoding_table, generating_table
from scripts.soak.tree import Tree

WINDOW = 300
"""Seconds: --restart-window."""
MEMORY_SLACK = 32 << 20
"""Bytes that a process may hold more than it did: what allocators keep, far below an answer leaked by each request."""
DESCRIPTORS_SLACK = 4
_DEATH = re.compile(r"^error: (.+ \(pid (\d+)\) .+?); (?:it is started again|the server)", re.MULTILINE)
_REPLAYED = re.compile(r"whole again: (\d+) requests")
_TROUBLE = re.compile(r"^\[\S+ \S+ (.*(?:CRITICAL|ERROR) .*)$", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description="Soak a server: python -m scripts.soak [...] [-- FLAGS OF THE SERVER]")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--kill-every", type=float, default=20, help="seconds between two kills; 0: none")
    parser.add_argument("--seed", type=int, default=None, help="of the table and the traffic; default: the time")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--quiet-every", type=float, default=45, help="seconds between two quiet points")
    parser.add_argument("--patience", type=float, default=300, help="seconds after which a request counts as hung")
    parser.add_argument("--model", default=None, help="default: the bundled model")
    parser.add_argument("--keep-log", default=None, help="file that the server's log is copied to")
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:at])
    if options.seed is None:
        options.seed = int(time.time())
    # As Ctrl-C: the server is ended. (The loop's own way with SIGINT is what ends the clients first.)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        sys.exit(0 if soak(options, words[at + 1 :]) else 1)
    except KeyboardInterrupt:
        sys.exit("\nstopped: nothing is judged")


def soak(options: argparse.Namespace, flags: list[str]) -> bool:
    """Whether all was well."""
    print(f"seed {options.seed}, {options.minutes:g} minutes, a kill every {options.kill_every:g} s", flush=True)
    ledger = Ledger()
    environment = {"TOKENMILL_STRICT": "1", "HF_HUB_OFFLINE": "1"}
    with running_server(*_flags(options.kill_every), *flags, model=options.model, env=environment) as server:
        tree = Tree(psutil.Process(server.launcher.pid))
        tree.processes()
        quiet = run(_soak(server, tree, ledger, options))
        tree.processes()
        ended = server.launcher.poll()
        if ended is not None:
            ledger.violation(f"the server has ended with exit code {ended}: {server.log()[-2000:]}")
        log = server.log()
        if options.keep_log is not None:
            server.log_path.rename(options.keep_log)
    for line in tree.left():
        ledger.violation(line)
    return _report(ledger, tree, quiet, log, time.monotonic() - ledger.began)


def _flags(kill_every: float) -> Iterator[str]:
    """A small pool, so that requests wait and are preempted; a short queue, so that some are refused; and twice as
    many deaths as there will be: a death that is not ours does not end the soak, a process that dies on and on does."""
    deaths = math.ceil(WINDOW / kill_every) if kill_every else 0
    yield from ("--max-total-tokens", "8192", "--max-running-requests", "16", "--max-queued-requests", "48")
    yield from ("--enable-priority-scheduling", "--enable-metrics", "--incremental-streaming-output")
    yield from ("--max-body-bytes", str(BODY_LIMIT), "--watchdog-timeout", "8", "--log-level-http", "error")
    yield from ("--restart-window", str(WINDOW), "--max-restarts", str(2 * deaths + 5))


async def _soak(server: LiveServer, tree: Tree, ledger: Ledger, options: argparse.Namespace) -> Quiet:
    clients = Clients(parse_url(server.url), [], ledger, random.Random(options.seed), options.patience)
    status, _, body = await clients.ask(Job("info", "call", "/model_info", None, method="GET"))
    facts = msgspec.json.decode(body)
    assert status == 200, body
    generates = facts["is_generation"]
    clients.table.extend((generating_table if generates else encoding_table)(options.seed))
    began = time.monotonic()
    await clients.learn()
    print(f"the oracle has answered {len(clients.table)} requests in {time.monotonic() - began:.1f} s", flush=True)
    ledger.began = time.monotonic()
    until = ledger.began + 60 * options.minutes
    operating, killing = asyncio.Lock(), asyncio.Lock()
    quiet = Quiet(clients, tree, (operating, killing))
    clients.gate.set()
    async with asyncio.TaskGroup() as group:
        for _ in range(options.clients):
            group.create_task(clients.work(until))
        group.create_task(quiet.every(options.quiet_every, until))
        if generates:
            group.create_task(operate(clients, facts["model_path"], until, operating))
        if options.kill_every:
            group.create_task(kill_on_and_on(clients, tree, options.kill_every, until, killing))
    await quiet.point()
    return quiet


def _report(ledger: Ledger, tree: Tree, quiet: Quiet, log: str, seconds: float) -> bool:
    ours = {outage.pid for outage in ledger.outages}
    strangers = [words for words, pid in _DEATH.findall(log) if int(pid) not in ours]
    lines, faults = tree.growth(MEMORY_SLACK, quiet.pool_bytes, DESCRIPTORS_SLACK)
    violations = [
        *ledger.violations,
        *ledger.unexcused(),
        *(f"a process has died that nobody here has killed: {words}" for words in strangers),
        *(f"a traceback in the log, line {number}" for number in _tracebacks(log)),
        *faults,
    ]
    print(f"\n{seconds:.0f} s, {ledger.asked} requests, {ledger.tokens} tokens compared, {quiet.points} quiet points")
    _table("requests by what became of them", ledger.requests)
    _table("answered rightly, by kind", ledger.kinds)
    _table("operations", ledger.operations)
    _table("kills", Counter(f"{outage.process}, {outage.signal}" for outage in ledger.outages))
    pauses = sorted(outage.whole - outage.at for outage in ledger.outages)
    if pauses:
        print(f"whole again: median {pauses[len(pauses) // 2]:.2f} s, longest {pauses[-1]:.2f} s; "
              f"{sum(map(int, _REPLAYED.findall(log)))} replays")  # fmt: skip
    print("memory and descriptors at quiet points:", *lines, sep="\n")
    trouble = Counter(re.sub(r"\d+", "N", line)[:90] for line in _TROUBLE.findall(log))
    if trouble:
        _table("errors in the log, by their beginning", trouble)
    print(f"\n{len(violations)} violations")
    for violation in violations[:SHOWN]:
        print(f"  {violation}")
    return not violations


def _tracebacks(log: str) -> Iterator[int]:
    return (number for number, line in enumerate(log.splitlines(), 1) if line.startswith("Traceback "))


def _table(title: str, counts: Counter[str]) -> None:
    print(f"{title}:")
    for name, count in counts.most_common():
        print(f"  {count:7} {name}")


if __name__ == "__main__":
    main()
