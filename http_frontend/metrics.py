"""What the frontend counts: requests, tokens, times, refusals. How it is shown is in metrics_page.py.

One process, one event loop: plain numbers are enough, and a token costs a comparison and an addition (journal.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from http_frontend.errors import RefusedError
from http_frontend.histogram import Histogram
from http_frontend.journal import Entry

_FIRST_TOKEN = (
    0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 20.0, 40.0, 60.0, 80.0, 100.0, 200.0,
    400.0,
)  # fmt: skip
_BETWEEN_TOKENS = (
    0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0,
    2.0, 4.0, 6.0, 8.0,
)  # fmt: skip
_WHOLE = (
    0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 20.0, 40.0, 60.0, 80.0, 100.0, 200.0, 400.0, 600.0,
    1200.0, 1800.0, 2400.0,
)  # fmt: skip
_BYTES = (256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262144.0, 1048576.0, 4194304.0, 16777216.0, 67108864.0)


@dataclass(slots=True)
class Metrics:
    """Counts since the start of the process. Requests are clients' items; the server's own probes are none.

    requests: that have ended, in whatever way, but for those that were invalid. aborted: those of them that were
    aborted, refused for load, broken, or left by their client. failed: broken by the server (500).
    prompt_tokens, cached_tokens: of requests that were begun; counted at their end. generation_tokens: as they come.
    refused: by reason. restarts: by process. epoch: of the process tree.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    requests: int = 0
    aborted: int = 0
    failed: int = 0
    replays: int = 0
    epoch: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    restarts: Counter[str] = field(default_factory=Counter)
    first_token: Histogram = field(default_factory=lambda: Histogram(_FIRST_TOKEN))
    between_tokens: Histogram = field(default_factory=lambda: Histogram(_BETWEEN_TOKENS))
    whole: Histogram = field(default_factory=lambda: Histogram(_WHOLE))
    bodies: Histogram = field(default_factory=lambda: Histogram(_BYTES))

    def tokens(self, seconds: float, count: int) -> None:
        """See `journal.TokenTimes`."""
        self.generation_tokens += count
        self.between_tokens.observe(seconds, count)

    def token(self, entry: Entry, now: float) -> None:
        """See `journal.TokenTimes`."""
        if entry.probe:
            return
        if entry.last_token:
            self.between_tokens.observe(now - entry.last_token)
        else:
            self.first_token.observe(now - entry.arrived)
        entry.last_token = now
        self.generation_tokens += 1

    def ended(self, entry: Entry) -> None:
        """An entry has left the journal. Of parallel samples, the request that only computes their prompt is no
        client's."""
        if entry.probe or entry.followers:
            return
        finish = entry.finish
        completed = finish is not None and finish.kind != "abort"
        status = None if finish is None else finish.status
        if status == 400:
            count_refused(self, "invalid")
            return
        self.requests += 1
        if completed or entry.first_at:
            self.prompt_tokens += entry.prompt_tokens
            self.cached_tokens += entry.cached_tokens
        if completed:
            self.whole.observe(entry.finished - entry.arrived)
            return
        self.aborted += 1
        self.failed += status == 500
        if status == 503:
            count_refused(self, "overloaded")


def count_refused(metrics: Metrics, reason: str) -> None:
    """A request was refused: "invalid", "overloaded", or any other short word (it becomes a label)."""
    metrics.refused[reason] += 1


def count_refusal(metrics: Metrics, refused: RefusedError) -> None:
    """A call was answered with `refused` before it had entries."""
    count_refused(metrics, "overloaded" if refused.status == 503 else "invalid")


def count_body(metrics: Metrics, size: int) -> None:
    """A request's body of `size` bytes has come."""
    metrics.bodies.observe(size)


def count_restart(metrics: Metrics, process: str, epoch: int) -> None:
    """`process` was replaced; the tree is in `epoch` now."""
    metrics.restarts[process] += 1
    metrics.epoch = epoch


def count_replays(metrics: Metrics, entries: int) -> None:
    """So many entries were sent again."""
    metrics.replays += entries
