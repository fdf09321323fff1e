"""Families of prometheus_client from plain numbers, and `/v1/loads` in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from http_frontend.histogram import Histogram


def gauge(name: str, help_text: str, value: float, labels: Mapping[str, str]) -> Metric:
    family = GaugeMetricFamily(name, help_text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def counter(name: str, help_text: str, value: float, labels: Mapping[str, str]) -> Metric:
    family = CounterMetricFamily(name, help_text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def by_label(name: str, help_text: str, label: str, counts: Mapping[str, int], model: str) -> Metric:
    family = CounterMetricFamily(name, help_text, labels=["model_name", label])
    for word, value in sorted(counts.items()):
        family.add_metric([model, word], value)
    return family


def histogram(name: str, help_text: str, histogram: Histogram, model: str) -> Metric:
    family = HistogramMetricFamily(name, help_text, labels=["model_name"])
    family.add_metric([model], histogram.buckets(), histogram.total)
    return family


def load_text(loads: list[dict[str, Any]]) -> bytes:
    """`/v1/loads` as Prometheus text: a gauge for each number of each rank."""
    registry = CollectorRegistry()
    registry.register(_Loads(loads))
    return generate_latest(registry)


class _Loads(Collector):
    def __init__(self, loads: list[dict[str, Any]]) -> None:
        self._loads = loads

    def collect(self) -> Iterator[Metric]:
        for load in self._loads:
            labels = {"dp_rank": str(load["dp_rank"])}
            for name, value in load.items():
                section = value if isinstance(value, dict) else {name: value}
                prefix = f"{name}_" if isinstance(value, dict) else ""
                for key, number in section.items():
                    if key not in ("dp_rank", "timestamp"):
                        yield gauge(f"sglang:{prefix}{key}", f"{prefix}{key} of /v1/loads.", number, labels)

    def describe(self) -> list[Metric]:
        return []
