"""
Prometheus metrics: the exposition, and parts shared by all modules with metrics.

The number of series depends on device types and reasons, never on the number of devices.

Names and meanings are part of the public interface: docs/metrics.md lists them, and a test keeps the two in step. The
processes of a replica share metrics through files in memory (``files``): a restarted worker continues with the
counters of its predecessor, and the gauges of a process that has ended are cleared.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, multiprocess
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector


def exposition(registry: CollectorRegistry, folder: Path | None, *collectors: Collector) -> bytes:
    """Return Prometheus' text format for all processes that share the folder; without a folder, for this one."""
    collected = CollectorRegistry()
    for collector in collectors:
        collected.register(collector)
    if folder is not None:
        multiprocess.MultiProcessCollector(collected, str(folder))  # type: ignore[no-untyped-call]
        return generate_latest(collected)
    return generate_latest(registry) + generate_latest(collected)


class ListenerMetrics:
    """
    Connection metrics of a listener other than RabbitMQ's.

    Args:
        listener: Prefix of the metric names.
        clients: Who connects, for the descriptions.
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
            f"Connections of {clients} closed by authbackend, by cause: too_many, slow.",
            ["cause"],
            registry=registry,
        )

    def connections_open(self, number: int) -> None:
        """Set the number of open connections."""
        self._connections.set(number)

    def connection_closed(self, cause: str) -> None:
        """Count a connection that the server closed."""
        self._closed.labels(cause).inc()


def admin_metrics(registry: CollectorRegistry) -> ListenerMetrics:
    """Return the metrics of the listener for people."""
    return ListenerMetrics(registry, "admin", "people")


def health_metrics(registry: CollectorRegistry) -> ListenerMetrics:
    """Return the metrics of the listener for health, CRLs and metrics."""
    return ListenerMetrics(registry, "health", "balancers, brokers' hosts and Prometheus")


def gauge(name: str, text: str, value: float | None) -> Metric:
    """Return a gauge without labels; it has no sample if ``value`` is None."""
    family = GaugeMetricFamily(f"authbackend_{name}", text, labels=[])
    if value is not None:
        family.add_metric([], value)
    return family


def gauges(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    """Return a gauge with one label; ``values`` is keyed by the label's value."""
    family = GaugeMetricFamily(f"authbackend_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
