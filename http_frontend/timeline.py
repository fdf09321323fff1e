"""A request's times in `meta_info`: its timeline on demand, and with --enable-metrics the contract's timings (§7.2)."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from http_frontend.journal import Entry


def mark_replay(entry: Entry) -> None:
    """`entry` is sent again, now."""
    entry.replayed += (time.perf_counter(),)


def timeline(entry: Entry) -> dict[str, Any]:
    """Seconds from the arrival of an ended request to what happened to it; null: it did not.

    The clocks of `time.perf_counter` here and of `time.monotonic` elsewhere are one on Linux and macOS.
    """
    return {
        "received": 0.0,
        "accepted": _since(entry, entry.accepted_at),
        "admitted": _since(entry, entry.admitted_at),
        "first_token": _since(entry, entry.first_at),
        "replayed": [_since(entry, at) for at in entry.replayed],
        "finished": _since(entry, entry.finished),
    }


def timings(entry: Entry) -> dict[str, Any]:
    """The contract's timings of an ended request; those of things that did not happen are left out."""
    offset = time.time() - time.perf_counter()
    made, spent = len(entry.output_ids), entry.finished - entry.first_at
    times: dict[str, Any] = {
        "request_received_ts": entry.arrived + offset,
        "request_finished_ts": entry.finished + offset,
    }
    if entry.accepted_at:
        times["api_server_dispatch_finish_ts"] = entry.accepted_at + offset
    if entry.admitted_at:
        times["queue_time"] = max(0.0, entry.admitted_at - (entry.accepted_at or entry.arrived))
        times["forward_entry_time"] = entry.admitted_at + offset
    if entry.first_at:
        times["prefill_finished_time"] = entry.first_at + offset
        times["first_token_latency"] = entry.first_at - entry.arrived
    if made > 1 and spent > 0:
        times["decode_throughput"] = (made - 1) / spent
    return times


def timing_fields(entry: Entry, *, with_timeline: bool, with_timings: bool) -> bytes:
    """What goes into the `meta_info` of an ended request, as JSON with a comma in front."""
    fields = timings(entry) if with_timings else {}
    if with_timeline:
        fields["timeline"] = timeline(entry)
    return b"," + msgspec.json.encode(fields)[1:-1] if fields else b""


def _since(entry: Entry, at: float) -> float | None:
    return round(max(0.0, at - entry.arrived), 6) if at else None
