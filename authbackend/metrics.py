"""
Prometheus metrics. The number of series depends on device types and reasons, never on the number of devices.

Names and meaning are part of the interface: docs/metrics.md lists them, and a test holds the two together. The
processes of a replica share them through files in memory (``metric_files``): a worker that is started again goes on with
the counters of the one that died, and the gauges of one that is gone are forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, multiprocess
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector


def exposition(registry: CollectorRegistry, folder: Path | None, *present: Collector) -> bytes:
    """Return the text format that Prometheus reads, over all processes that share a folder, or of this one."""
    collected = CollectorRegistry()
    for collector in present:
        collected.register(collector)
    if folder is not None:
        multiprocess.MultiProcessCollector(collected, str(folder))  # type: ignore[no-untyped-call]
        return generate_latest(collected)
    return generate_latest(registry) + generate_latest(collected)


class ListenerMetrics:
    """
    What a listener other than RabbitMQ's counts of its connections.

    Args:
        listener: Begins the names.
        clients: Who they are, for the descriptions.
    """

    def __init__(self, registry: CollectorRegistry, listener: str, clients: str) -> None:
        self._connections = Gauge(
            f"authbackend_{listener}_connections",
            f"Open connections of {clients}.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._closed = Counter(
            f"authbackend_{listener}_connections_closed",
            f"Connections of {clients} closed by this side, by cause: too_many, slow.",
            ["cause"],
            registry=registry,
        )

    def connections_open(self, number: int) -> None:
        """So many are open."""
        self._connections.set(number)

    def connection_closed(self, cause: str) -> None:
        """One was closed by this side."""
        self._closed.labels(cause).inc()


def admin_metrics(registry: CollectorRegistry) -> ListenerMetrics:
    """Return what the listener for people counts."""
    return ListenerMetrics(registry, "admin", "people")


def health_metrics(registry: CollectorRegistry) -> ListenerMetrics:
    """Return what the listener for health, lists and metrics counts."""
    return ListenerMetrics(registry, "health", "balancers, brokers' hosts and Prometheus")


def gauge(name: str, text: str, value: float | None) -> Metric:
    """Return a gauge without labels; without a value it is absent."""
    family = GaugeMetricFamily(f"authbackend_{name}", text, labels=[])
    if value is not None:
        family.add_metric([], value)
    return family


def gauges(name: str, text: str, label: str, found: Mapping[str, float]) -> Metric:
    """Return a gauge with one label, by the label's values."""
    family = GaugeMetricFamily(f"authbackend_{name}", text, labels=[label])
    for key, value in found.items():
        family.add_metric([key], value)
    return family
