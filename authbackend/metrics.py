"""
Prometheus metrics. The number of series depends on device types and reasons, never on the number of devices.

Names and meaning are part of the interface: docs/metrics.md lists them, and a test holds the two together.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

from authbackend import __version__
from authbackend.policy.decide import Decision
from authbackend.registry.snapshot import Snapshot
from authbackend.registry.sync import Refreshed

REQUEST_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
SYNC_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Every metric of one process; also the observer of the registry's copy."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._broker_metrics()
        self._registry_metrics()
        info = Gauge(
            "authbackend_build_info", "Always 1; labels tell what runs.", ["version", "python"], registry=self.registry
        )
        info.labels(__version__, platform.python_version()).set(1)
        self._durations: dict[str, Histogram] = {}
        self._decision_children: dict[tuple[str, bool, str, str], Counter] = {}

    def _broker_metrics(self) -> None:
        self._decisions = Counter(
            "authbackend_decisions",
            "Answers to RabbitMQ by endpoint, verdict, reason and device type (or account, unknown).",
            ["endpoint", "verdict", "reason", "device_type"],
            registry=self.registry,
        )
        self._duration = Histogram(
            "authbackend_request_duration_seconds",
            "Time from the request's head to its answer.",
            ["endpoint"],
            buckets=REQUEST_BUCKETS_S,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "authbackend_requests_in_flight", "Requests of RabbitMQ being answered.", registry=self.registry
        )
        self.malformed = Counter(
            "authbackend_malformed_requests",
            "Requests denied because they are not RabbitMQ's, by cause.",
            ["endpoint", "cause"],
            registry=self.registry,
        )
        self.failures = Counter(
            "authbackend_request_failures",
            "Requests answered 503 because this service failed, by cause; never counted as a denial.",
            ["endpoint", "cause"],
            registry=self.registry,
        )
        self.password_checks = Counter(
            "authbackend_password_checks",
            "Password checks by result: right, wrong, remembered, refused.",
            ["result"],
            registry=self.registry,
        )
        self.passwords_running = Gauge(
            "authbackend_password_checks_running",
            "Password checks running or waiting for a thread.",
            registry=self.registry,
        )

    def _registry_metrics(self) -> None:
        self._version = Gauge(
            "authbackend_registry_version",
            "Upper end of the transactions that the copy contains (PostgreSQL transaction id).",
            registry=self.registry,
        )
        self._entries = Gauge(
            "authbackend_registry_entries", "Entries of the copy in memory.", ["entity"], registry=self.registry
        )
        self._changed_at = Gauge(
            "authbackend_registry_changed_timestamp_seconds", "When the copy last changed.", registry=self.registry
        )
        self._sync_age = Gauge(
            "authbackend_registry_sync_age_seconds",
            "Time since the start of the last look at the database that succeeded.",
            registry=self.registry,
        )
        self._sync_duration = Histogram(
            "authbackend_registry_sync_duration_seconds",
            "Duration of a look at the database, by kind: changes or full.",
            ["kind"],
            buckets=SYNC_BUCKETS_S,
            registry=self.registry,
        )
        self._sync_failures = Counter(
            "authbackend_registry_sync_failures", "Looks at the database that failed.", registry=self.registry
        )
        self._comparisons = Counter(
            "authbackend_registry_comparisons",
            "Comparisons of the whole copy with the database.",
            registry=self.registry,
        )
        self._differences = Counter(
            "authbackend_registry_differences",
            "Rows in which the copy differed from the database; anything above 0 is a fault.",
            registry=self.registry,
        )

    def decided(self, endpoint: str, decision: Decision) -> None:
        """Count an answer."""
        key = (endpoint, decision.allowed, decision.reason, decision.kind)
        child = self._decision_children.get(key)
        if child is None:
            verdict = "allow" if decision.allowed else "deny"
            child = self._decisions.labels(endpoint, verdict, decision.reason, decision.kind)
            self._decision_children[key] = child
        child.inc()

    def answered(self, endpoint: str, seconds: float) -> None:
        """Note how long an answer took."""
        child = self._durations.get(endpoint)
        if child is None:
            child = self._durations[endpoint] = self._duration.labels(endpoint)
        child.observe(seconds)

    def watch_sync_age(self, age_s: Callable[[], float | None]) -> None:
        """Ask for the age of the copy at each scrape; NaN before the first load."""
        self._sync_age.set_function(lambda: float("nan") if (age := age_s()) is None else age)

    def refreshed(self, snapshot: Snapshot, refreshed: Refreshed) -> None:
        """A look at the database succeeded."""
        self._sync_duration.labels("full" if refreshed.full else "changes").observe(refreshed.duration_s)
        if snapshot.mark is not None:
            self._version.set(snapshot.mark.xmax)
        if refreshed.changed or refreshed.full:
            self._changed_at.set(time.time())
            for entity, size in snapshot.sizes().items():
                self._entries.labels(entity).set(size)

    def refresh_failed(self) -> None:
        """A look at the database failed."""
        self._sync_failures.inc()

    def compared(self, differences: int) -> None:
        """The copy was compared with the database row by row."""
        self._comparisons.inc()
        self._differences.inc(differences)

    def exposition(self) -> bytes:
        """Return the text format that Prometheus reads."""
        return generate_latest(self.registry)
