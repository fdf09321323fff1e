"""GET /v1/loads: how busy the server is (contract §4.7). GET /get_load: the older form, which sglang-router reads."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from engine.config.logs import timestamp
from http_frontend.errors import invalid, json_response, unreadable
from http_frontend.frontend import Frontend
from http_frontend.info import API_VERSION

SECTIONS = ("core", "memory", "spec", "lora", "disagg", "queues", "all")
FORMATS = ("json", "prometheus")
_PATIENCE = 0.25
"""Seconds that the scheduler gets to say how things stand now; after that its last word holds."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """The core of a rank's load."""

    num_running_reqs: int
    num_waiting_reqs: int
    num_waiting_uncached_tokens: int
    num_used_tokens: int
    num_total_tokens: int
    max_total_num_tokens: int
    max_running_requests: int
    token_usage: float
    gen_throughput: float
    cache_hit_rate: float
    utilization: float


def load_of(frontend: Frontend) -> Load:
    """The load by the scheduler's newest state; zeros before there is one."""
    state, limits = frontend.watch.state, frontend.limits
    known = limits.result() if limits.done() else None
    size = known.max_total_num_tokens if known else 0
    running, used = state.get("num_running_reqs", 0), state.get("num_used_tokens", 0)
    uncached = state.get("num_waiting_uncached_tokens", 0)
    usage = used / size if size else 0.0
    return Load(
        num_running_reqs=running,
        num_waiting_reqs=state.get("num_waiting_reqs", 0),
        num_waiting_uncached_tokens=uncached,
        num_used_tokens=used,
        num_total_tokens=used + uncached,
        max_total_num_tokens=size,
        max_running_requests=known.max_running_requests if known else 0,
        token_usage=usage,
        gen_throughput=state.get("last_gen_throughput", 0.0) if running else 0.0,
        cache_hit_rate=state.get("cache_hit_rate", 0.0),
        utilization=usage,
    )


class Loads:
    """The handlers. They wait for the model to be loaded, since the limits are known only then."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def loads(self, request: Request) -> Response:
        query = request.query_params
        sections = _sections(query.get("include") or "all")
        form = query.get("format") or "json"
        if form not in FORMATS:
            raise unreadable(f"1 validation error: format must be {' or '.join(FORMATS)}, got {form!r}")
        _check_rank(query.get("dp_rank"))
        # Shielded: that one waiter leaves must not cancel what all wait for.
        await asyncio.shield(self._frontend.limits)
        await self._frontend.watch.newest(_PATIENCE)
        now = time.time()
        loads = [self._rank(sections, now)]
        if form == "prometheus":
            from http_frontend.prometheus import load_text  # its library is loaded only where it is wanted

            return Response(load_text(loads), media_type="text/plain; version=0.0.4")
        return json_response(
            {
                "timestamp": timestamp(now),
                "version": API_VERSION,
                "accelerator": "cpu",
                "num_accelerators": 1,
                "loads": loads,
            }
        )

    async def old_loads(self, _request: Request) -> Response:
        """An entry for each rank: sglang-router takes the sum of their `num_tokens` for the worker's load."""
        await asyncio.shield(self._frontend.limits)
        await self._frontend.watch.newest(_PATIENCE)
        load = load_of(self._frontend)
        return json_response(
            [
                {
                    "dp_rank": 0,
                    "num_reqs": load.num_running_reqs + load.num_waiting_reqs,
                    "num_waiting_reqs": load.num_waiting_reqs,
                    "num_tokens": load.num_total_tokens,
                }
            ]
        )

    def _rank(self, sections: set[str], now: float) -> dict[str, Any]:
        limits, state = self._frontend.limits.result(), self._frontend.watch.state
        core = msgspec.to_builtins(load_of(self._frontend))
        rank = {"timestamp": now, "dp_rank": 0} | {
            name: round(value, 4) if isinstance(value, float) else value for name, value in core.items()
        }
        if "memory" in sections:
            rank["memory"] = {
                "weight_gb": round(limits.weight_gb, 3),
                "kv_cache_gb": round(limits.kvcache_gb, 3),
                "graph_gb": round(limits.graph_gb, 3),
                "token_capacity": limits.max_total_num_tokens,
            }
        if "queues" in sections:
            waiting = state.get("num_waiting_reqs", 0)
            rank["queues"] = {
                "waiting": waiting,
                "grammar": state.get("num_grammar_reqs", 0),
                "paused": waiting if self._frontend.paused else 0,
                "retracted": state.get("num_retracted_reqs", 0),
            }
        return rank


def _sections(words: str) -> set[str]:
    asked = {word.strip() for word in words.split(",") if word.strip()}
    unknown = sorted(asked - set(SECTIONS))
    if unknown:
        raise unreadable(f"1 validation error: include must be of {', '.join(SECTIONS)}, got {unknown[0]!r}")
    return set(SECTIONS) if "all" in asked else asked


def _check_rank(word: str | None) -> None:
    if not word:
        return
    try:
        rank = int(word)
    except ValueError:
        raise unreadable(f"1 validation error: dp_rank must be an integer, got {word!r}") from None
    if rank != 0:
        raise invalid(f"dp_rank must be in [0, 1), got {rank}.")
