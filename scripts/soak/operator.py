"""The operator and the killer: what is done to the server while its clients ask."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from typing import Any

from engine.bench.errors import LostConnectionError
from scripts.soak.clients import Clients
from scripts.soak.ledger import Ledger, Outage
from scripts.soak.table import Job
from scripts.soak.tree import ROLES, Tree

SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV)
PATIENCE = 120.0
"""Seconds in which a process must have died, and in which the server must be whole again."""
_TWICE = 0.2
"""How often a second process dies within a second of the first."""
_ACTIONS = {"flush": 4, "update": 2, "retract": 2, "in_place": 2, "abort_all": 1, "abort": 1}


async def operate(clients: Clients, model_path: str, until: float, calm: asyncio.Lock) -> None:
    """Now and then: empty the cache, read the weights again, pause and go on, abort everything."""
    source = clients.random
    while time.monotonic() < until:
        await asyncio.sleep(2 + 4 * source.random())
        async with calm:
            action = source.choices([*_ACTIONS], [*_ACTIONS.values()])[0]
            await _act(clients, action, model_path)
            clients.ledger.operations[action] += 1


async def _act(clients: Clients, action: str, model_path: str) -> None:
    ledger, began = clients.ledger, time.monotonic()
    if action == "flush":
        await _call(clients, "/flush_cache", {}, (200, 400))
    elif action == "update":
        await _call(clients, "/update_weights_from_disk", {"model_path": model_path}, (200,))
    elif action == "abort_all":
        await _call(clients, "/abort_request", {"abort_all": True}, (200,))
        ledger.aborts_of_all.append((began, time.monotonic()))
    else:
        await _call(clients, "/pause_generation", {"mode": action}, (200,))
        if action == "abort":
            ledger.aborts_of_all.append((began, time.monotonic()))
        await asyncio.sleep(clients.random.random())
        await _call(clients, "/continue_generation", {}, (200,))
        ledger.pauses.append((began, time.monotonic()))


async def _call(clients: Clients, path: str, body: Any, statuses: tuple[int, ...]) -> None:
    """Until it is answered: a frontend that dies takes the question with it."""
    ledger = clients.ledger
    while True:
        sent = time.monotonic()
        try:
            async with asyncio.timeout(clients.patience):
                status, _, answer = await clients.ask(Job(path, "call", path, body))
        except LostConnectionError as error:
            ledger.incident("lost", f"{path}: {error}", sent)
            ledger.operations["connection lost with the frontend, asked again"] += 1
            await asyncio.sleep(0.3)
            continue
        except TimeoutError:
            ledger.violation(f"{path} {body}: no answer within {clients.patience:g} s")
            return
        if status not in statuses:
            ledger.violation(f"{path} {body}: answered {status}: {answer[:200]!r}")
        return


async def kill_on_and_on(clients: Clients, tree: Tree, every: float, until: float, calm: asyncio.Lock) -> None:
    """Send a random signal to a random process every `every` seconds, now and then also to another one while the server
    is not whole yet; and wait until it is."""
    source = random.Random(clients.random.random())
    due = time.monotonic() + every
    while due < until:
        await asyncio.sleep(due - time.monotonic())
        async with calm:
            first, second = source.sample(ROLES, 2)
            kills = [_kill(clients, tree, first, source.choice(SIGNALS), 0.0)]
            if source.random() < _TWICE:
                kills.append(_kill(clients, tree, second, source.choice(SIGNALS), source.random()))
            await asyncio.gather(*kills)
        due = max(due + every, time.monotonic() + every / 4)


async def _kill(clients: Clients, tree: Tree, role: str, number: signal.Signals, delay: float) -> None:
    await asyncio.sleep(delay)
    ledger = clients.ledger
    process = tree.processes().get(role)
    if process is None:
        ledger.violation(f"there is no {role} to be killed")
        return
    outage = Outage(role, number.name, process.pid, time.monotonic())
    ledger.outages.append(outage)
    os.kill(process.pid, number)
    deadline = outage.at + PATIENCE
    while tree.runs(process):
        if time.monotonic() > deadline:
            ledger.violation(f"{role} (pid {process.pid}) has outlived {number.name} by {PATIENCE:g} s")
            return
        await asyncio.sleep(0.02)
    outage.dead = time.monotonic()
    while role not in tree.processes():
        if time.monotonic() > deadline:
            ledger.violation(f"no other {role} within {PATIENCE:g} s")
            return
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.1)  # by now the frontend has heard of it
    if await healthy(clients, ledger, deadline + PATIENCE):
        outage.whole = time.monotonic()
    print(f"{outage.at - ledger.began:7.1f} s: {number.name} to the {role}, "
          f"whole again after {outage.whole - outage.at:.2f} s", flush=True)  # fmt: skip


async def healthy(clients: Clients, ledger: Ledger, deadline: float) -> bool:
    """Wait until `/health` is 200."""
    while time.monotonic() < deadline:
        try:
            status, _, _ = await clients.ask(Job("health", "call", "/health", None, method="GET"))
        except LostConnectionError:
            status = 0
        if status == 200:
            return True
        await asyncio.sleep(0.05)
    ledger.violation("/health has not become 200 again")
    return False
