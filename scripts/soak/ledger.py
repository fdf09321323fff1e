"""The books of a soak: what became of every request, and what of it needs an excuse."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass, field

SHOWN = 40
_GRACE = 2.0
"""Seconds after the end of an outage in which a client may still notice it."""
_DEATHS = re.compile(r"was in flight at (\d+) deaths of the scheduler")


@dataclass
class Outage:
    """A process that was killed here. at: when the signal was sent; dead: when the process had gone; whole: when
    `/health` was 200 again (`time.monotonic()`; infinite until then)."""

    process: str
    signal: str
    pid: int
    at: float
    dead: float = float("inf")
    whole: float = float("inf")


@dataclass(frozen=True)
class Incident:
    """Something that is right only if something else happened while the request ran.

    kind: lost (needs a dead frontend), unhealthy (any outage), aborted (a call that ends all), given up (deaths of the
    scheduler), cut (an answer that says that the server cannot go on). behind: seconds by which a client that reads
    slowly may have noticed it late, as what was sent before comes first.
    """

    kind: str
    what: str
    sent: float
    noticed: float
    behind: float = 0.0


@dataclass
class Ledger:
    """requests: by what became of them. kinds: requests answered right, by what they were. tokens: compared ones."""

    requests: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    asked: int = 0
    incidents: list[Incident] = field(default_factory=list)
    outages: list[Outage] = field(default_factory=list)
    aborts_of_all: list[tuple[float, float]] = field(default_factory=list)
    pauses: list[tuple[float, float]] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def violation(self, what: str) -> None:
        moment = f"{time.monotonic() - self.began:.1f} s: {what}"
        print(f"VIOLATION at {moment}", flush=True)
        self.violations.append(moment)

    def incident(self, kind: str, what: str, sent: float, behind: float = 0.0) -> None:
        self.incidents.append(Incident(kind, what, sent, time.monotonic(), behind))

    def unexcused(self) -> list[str]:
        """What is said of the incidents that nothing explains."""
        excuses = {
            "lost": self._frontend_was_dead,
            "unhealthy": self._anything_was_down,
            "aborted": self._all_were_aborted,
            "given up": self._scheduler_died_often,
            "not ready": lambda incident: self._anything_was_down(incident) or self._was_paused(incident),
        }
        return [
            f"{incident.noticed - self.began:.1f} s: {incident.kind} without a reason: {incident.what}"
            for incident in self.incidents
            if not excuses[incident.kind](incident)
        ]

    def _frontend_was_dead(self, incident: Incident) -> bool:
        return any(
            outage.process == "frontend"
            and incident.sent <= outage.whole
            and outage.dead - 1.0 <= incident.noticed <= outage.whole + _GRACE + incident.behind
            for outage in self.outages
        )

    def _anything_was_down(self, incident: Incident) -> bool:
        return any(incident.sent <= outage.whole + _GRACE and outage.at <= incident.noticed for outage in self.outages)

    def _all_were_aborted(self, incident: Incident) -> bool:
        return any(incident.sent <= end and begin <= incident.noticed for begin, end in self.aborts_of_all)

    def _was_paused(self, incident: Incident) -> bool:
        return any(incident.sent <= end + 1.0 and begin <= incident.noticed for begin, end in self.pauses)

    def _scheduler_died_often(self, incident: Incident) -> bool:
        """Two deaths explain a 500 only where the request was on trial at the second; three always do."""
        found = _DEATHS.search(incident.what)
        deaths = sum(
            outage.process == "scheduler" and incident.sent <= outage.dead and outage.at <= incident.noticed
            for outage in self.outages
        )
        return found is not None and 2 <= int(found[1]) <= deaths
