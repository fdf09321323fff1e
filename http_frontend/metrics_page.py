"""GET /metrics: the frontend's counts and the scheduler's newest state as Prometheus text (contract §4.7)."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from http_frontend.frontend import Frontend
from http_frontend.histogram import Histogram
from http_frontend.loads import Load, load_of
from http_frontend.metrics import Metrics
from http_frontend.prometheus import by_label, counter, gauge, histogram

_PATIENCE = 0.05
"""Seconds that the scheduler gets to say how things stand now."""


class MetricsPage:
    """The handler, with a registry of its own. Its label names the model as it was launched."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._registry = CollectorRegistry()
        self._registry.register(_Families(frontend))

    async def page(self, request: Request) -> Response:
        await self._frontend.watch.newest(_PATIENCE)
        encode, media_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._registry), headers={"Content-Type": media_type})


class _Families(Collector):
    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._model = frontend.run.server.served_model_name or frontend.run.model.name

    def collect(self) -> Iterator[Metric]:
        frontend = self._frontend
        load = load_of(frontend)
        yield from _load(load, self._model)
        yield from _counts(frontend.metrics, self._model)
        yield from _times(frontend.metrics, self._model)
        yield from _state_of(frontend, load, self._model)

    def describe(self) -> list[Metric]:
        return []


def _load(load: Load, model: str) -> Iterator[Metric]:
    for name, help_text, value in (
        ("num_running_reqs", "Requests that run.", load.num_running_reqs),
        ("num_queue_reqs", "Requests that wait in the scheduler.", load.num_waiting_reqs),
        ("num_used_tokens", "Tokens of the KV pool that running requests hold.", load.num_used_tokens),
        ("token_usage", "Share of the KV pool that running requests hold.", load.token_usage),
        ("cache_hit_rate", "Share of prompt tokens found in the prefix cache, recently.", load.cache_hit_rate),
        ("gen_throughput", "Output tokens per second of the last decode interval.", load.gen_throughput),
    ):
        yield gauge(f"sglang:{name}", help_text, value, {"model_name": model})


def _counts(metrics: Metrics, model: str) -> Iterator[Metric]:
    labels = {"model_name": model}
    for name, help_text, value in (
        ("sglang:prompt_tokens", "Prompt tokens of requests that have ended.", metrics.prompt_tokens),
        ("sglang:generation_tokens", "Output tokens.", metrics.generation_tokens),
        ("sglang:cached_tokens", "Prompt tokens that came from the prefix cache.", metrics.cached_tokens),
        ("sglang:num_requests", "Requests that have ended.", metrics.requests),
        ("sglang:num_aborted_requests", "Requests that were aborted, however.", metrics.aborted),
        ("tokenmill:failed_requests", "Requests that the server broke (500).", metrics.failed),
        ("tokenmill:replays", "Requests sent again after the death of a process.", metrics.replays),
    ):
        yield counter(name, help_text, value, labels)
    yield by_label("tokenmill:refused", "Requests that were refused.", "reason", metrics.refused, model)
    yield by_label("tokenmill:restarts", "Processes that were replaced.", "process", metrics.restarts, model)


def _times(metrics: Metrics, model: str) -> Iterator[Metric]:
    for name, help_text, counted in (
        ("sglang:time_to_first_token_seconds", "From arrival to the first token.", metrics.first_token),
        ("sglang:inter_token_latency_seconds", "Between two tokens of a request.", metrics.between_tokens),
        ("sglang:e2e_request_latency_seconds", "From arrival to the end of a request.", metrics.whole),
        ("tokenmill:request_body_bytes", "Size of the bodies of calls.", metrics.bodies),
    ):
        yield histogram(name, help_text, counted, model)


def _state_of(frontend: Frontend, load: Load, model: str) -> Iterator[Metric]:
    """What is Tokenmill's own of the scheduler's state and of the server's life."""
    labels = {"model_name": model}
    state, watch = frontend.watch.state, frontend.watch
    yield gauge("tokenmill:up", "Whether the server serves.", frontend.up, labels)
    yield gauge("tokenmill:paused", "Whether generation is paused.", frontend.paused, labels)
    yield gauge("tokenmill:epoch", "Epoch of the process tree.", frontend.metrics.epoch, labels)
    yield gauge("tokenmill:requests_in_flight", "Clients' requests in flight.", len(frontend.journal), labels)
    yield gauge("tokenmill:startup_seconds", "From the launch until it served.", frontend.startup_seconds, labels)
    if state:
        yield gauge("tokenmill:scheduler_state_age_seconds", "Age of the scheduler's figures.", watch.age, labels)
    pool = GaugeMetricFamily("tokenmill:kv_pool_tokens", "Tokens of the KV pool.", labels=["model_name", "state"])
    for word in ("used", "cached", "free"):
        pool.add_metric([model, word], state.get(f"num_{word}_tokens", 0))
    yield pool
    yield counter("tokenmill:retractions", "Preemptions.", state.get("num_retractions", 0), labels)
    yield counter("tokenmill:prefilled_tokens", "Prompt tokens computed.", state.get("prefill_tokens", 0), labels)
    yield gauge(
        "tokenmill:waiting_uncached_tokens", "Tokens that waiting requests bring.", load.num_waiting_uncached_tokens,
        labels,
    )  # fmt: skip
    bounds, buckets = state.get("step_bounds", ()), state.get("step_buckets", [0])
    steps = Histogram(bounds, list(buckets), state.get("step_seconds", 0.0))
    yield histogram("tokenmill:step_seconds", "What a step of the scheduler takes.", steps, model)
