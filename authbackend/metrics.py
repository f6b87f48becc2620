"""
Prometheus metrics. The number of series depends on device types and reasons, never on the number of devices.

Names and meaning are part of the interface: docs/metrics.md lists them, and a test holds the two together. The
processes of a replica share them through files in memory (``metric_files``): a worker that is started again goes on with
the counters of the one that died, and the gauges of one that is gone are forgotten.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, multiprocess
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from authbackend import __version__, clocks
from authbackend.policy.decide import Decision
from authbackend.registry.announcer import Peers
from authbackend.registry.store import State
from authbackend.registry.follower import FeedRead, RefreshResult

REQUEST_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
SYNC_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
MOST_DECISIONS = 5_000
OTHER_TYPES = "(other)"
"""The device type of decisions counted beyond that many series: no type has this name."""

STALL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


def exposition(registry: CollectorRegistry, folder: Path | None, *present: Collector) -> bytes:
    """Return the text format that Prometheus reads, over all processes that share a folder, or of this one."""
    collected = CollectorRegistry()
    for collector in present:
        collected.register(collector)
    if folder is not None:
        multiprocess.MultiProcessCollector(collected, str(folder))  # type: ignore[no-untyped-call]
        return generate_latest(collected)
    return generate_latest(registry) + generate_latest(collected)


class BrokerMetrics:
    """What a worker counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._decisions = Counter(
            "authbackend_decisions",
            "Answers to RabbitMQ by endpoint, verdict, reason and device type (or account, unknown; (other) beyond 5,000 series).",
            ["endpoint", "verdict", "reason", "device_type"],
            registry=registry,
        )
        self._duration = Histogram(
            "authbackend_request_duration_seconds",
            "Time from the arrival of a request at the process to its answer, waiting for its turn included.",
            ["endpoint"],
            buckets=REQUEST_BUCKETS_S,
            registry=registry,
        )
        self.in_flight = Gauge(
            "authbackend_requests_in_flight",
            "Requests of RabbitMQ that wait for the rest of their body or for a password check.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.malformed = Counter(
            "authbackend_malformed_requests",
            "Requests denied because they are not RabbitMQ's, by cause.",
            ["endpoint", "cause"],
            registry=registry,
        )
        self.unknown_paths = Counter(
            "authbackend_unknown_paths",
            "Requests at a path that is none of RabbitMQ's questions, answered 404; the log says which is expected.",
            registry=registry,
        )
        self.failures = Counter(
            "authbackend_request_failures",
            "Requests answered 503 because this service failed, by cause; never counted as a denial.",
            ["endpoint", "cause"],
            registry=registry,
        )
        self.shed = Counter(
            "authbackend_requests_shed",
            "Requests answered 503 at once because they had waited too long for their turn.",
            ["endpoint"],
            registry=registry,
        )
        self._connection_metrics(registry)
        self._password_metrics(registry)
        self._durations: dict[str, Histogram] = {}
        self._decision_children: dict[tuple[str, bool, str, str], Counter] = {}

    def _connection_metrics(self, registry: CollectorRegistry) -> None:
        self.connections = Gauge(
            "authbackend_connections", "Open connections.", registry=registry, multiprocess_mode="livesum"
        )
        self.connections_closed = Counter(
            "authbackend_connections_closed",
            "Connections closed by this side, by cause: too_many, slow.",
            ["cause"],
            registry=registry,
        )
        self.stalls = Histogram(
            "authbackend_event_loop_stall_seconds",
            "How late a worker's event loop was, looked at ten times a second.",
            buckets=STALL_BUCKETS_S,
            registry=registry,
        )

    def _password_metrics(self, registry: CollectorRegistry) -> None:
        self.password_checks = Counter(
            "authbackend_password_checks",
            "Password checks by result: right, wrong, remembered, refused.",
            ["result"],
            registry=registry,
        )
        self.passwords_running = Gauge(
            "authbackend_password_checks_running",
            "Password checks running or waiting for a thread.",
            registry=registry,
            multiprocess_mode="livesum",
        )

    def connections_open(self, number: int) -> None:
        """So many connections of RabbitMQ are open."""
        self.connections.set(number)

    def connection_closed(self, cause: str) -> None:
        """A connection of RabbitMQ was closed by this side."""
        self.connections_closed.labels(cause).inc()

    def decided(self, endpoint: str, decision: Decision) -> None:
        """Count an answer."""
        key = (endpoint, decision.allowed, decision.reason, decision.kind)
        child = self._decision_children.get(key)
        if child is None:
            verdict = "allow" if decision.allowed else "deny"
            full = len(self._decision_children) >= MOST_DECISIONS
            child = self._decisions.labels(endpoint, verdict, decision.reason, OTHER_TYPES if full else decision.kind)
            if not full:
                self._decision_children[key] = child
        child.inc()

    def answered(self, endpoint: str, seconds: float) -> None:
        """Note how long an answer took."""
        child = self._durations.get(endpoint)
        if child is None:
            child = self._durations[endpoint] = self._duration.labels(endpoint)
        child.observe(seconds)


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


class RegistryMetrics:
    """
    What the process that follows the database counts.

    Args:
        tell: Takes what it knows of its copy and of the other replicas, for :class:`ReplicaMetrics`.
    """

    def __init__(self, registry: CollectorRegistry, tell: Callable[[dict[str, Any]], object]) -> None:
        self._tell = tell
        self._known: dict[str, Any] = {}
        self._sync_metrics(registry)

    def _sync_metrics(self, registry: CollectorRegistry) -> None:
        self._sync_duration = Histogram(
            "authbackend_registry_sync_duration_seconds",
            "Duration of a look at the database, by kind: changes or full.",
            ["kind"],
            buckets=SYNC_BUCKETS_S,
            registry=registry,
        )
        self._sync_failures = Counter(
            "authbackend_registry_sync_failures", "Looks at the database that failed.", registry=registry
        )
        self._comparisons = Counter(
            "authbackend_registry_comparisons", "Comparisons of the whole copy with the database.", registry=registry
        )
        self._differences = Counter(
            "authbackend_registry_differences",
            "Rows in which the copy differed from the database; anything above 0 is a fault.",
            registry=registry,
        )
        self._ignored = Counter(
            "authbackend_registry_changes_ignored",
            "Changes of an entity that a newer schema has and this version does not know: upgrade the replica.",
            registry=registry,
        )
        self._gone = Counter(
            "authbackend_registry_served_changes_gone",
            "Entries that were served in a state which the database lost, in a fail-over, a crash or a restore; the log names them.",
            registry=registry,
        )

    def ignored(self, changes: int) -> None:
        """Changes were of an entity that a newer schema has."""
        self._ignored.inc(changes)

    def refreshed(self, _: FeedRead, refreshed: RefreshResult, *, lasting: bool) -> None:
        """A look at the database succeeded."""
        self._sync_duration.labels("full" if refreshed.full else "changes").observe(refreshed.duration_s)
        known = {**self._known, "lasting": lasting}
        if refreshed.changed or refreshed.full:
            known["changed_at"] = time.time()
        self._learn(known)

    def refresh_failed(self) -> None:
        """A look at the database failed."""
        self._sync_failures.inc()

    def compared(self, differences: int) -> None:
        """The copy was compared with the database row by row."""
        self._comparisons.inc()
        self._differences.inc(differences)

    def served_changes_gone(self, number: int) -> None:
        """A database in another life lacks changes that were served."""
        self._gone.inc(number)

    def peers(self, peers: Peers) -> None:
        """Take what the database knows of the replicas."""
        self._learn({**self._known, "states": peers.states, "ages_s": peers.ages_s, "twins": peers.twins})

    def _learn(self, known: dict[str, Any]) -> None:
        if known != self._known:
            self._known = known
            self._tell(known)


class ReplicaMetrics(Collector):
    """
    What is true of the replica and what it knows of the others.

    Args:
        present: Returns what is true at this moment; asked at each scrape.
        known: Returns what the process that follows the database told last, None if there is no such process.
    """

    def __init__(self, present: Callable[[], Present], known: Callable[[], dict[str, Any] | None]) -> None:
        self._present = present
        self._known = known

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges, for one scrape."""
        now = self._present()
        state = now.state
        known = self._known() or {}
        yield _gauge(
            "registry_version",
            "Upper end of the transactions that the copy contains (PostgreSQL transaction id).",
            None if state is None else state.position.xmax,
        )
        yield _gauges("registry_entries", "Entries of the copy in memory.", "entity", now.sizes)
        taken, available = now.memory_bytes
        yield _gauge("registry_memory_bytes", "Memory that the copy has, what it can use again included.", taken)
        yield _gauge(
            "registry_memory_available_bytes",
            "Memory that is left in the file system of registry.memory_dir.",
            available,
        )
        yield _gauge("registry_changed_timestamp_seconds", "When the copy last changed.", known.get("changed_at"))
        yield _gauge(
            "registry_sync_age_seconds",
            "Time since the start of the last look at the database that succeeded; NaN before the first.",
            float("nan") if state is None else clocks.uptime() - state.synced_at,
        )
        yield _gauge(
            "registry_on_disk", "1 if the copy on disk holds what the one in memory does.", known.get("lasting", False)
        )
        yield _gauges("workers", "Workers by state: serving, starting, hanging.", "state", now.workers)
        yield _gauge("worker_restarts", "How often a worker had to be started again.", now.restarts)
        yield _gauges("replicas", "Replicas by state: live, silent, stopped.", "state", known.get("states", {}))
        yield _gauges(
            "replica_sync_age_seconds",
            "How far each replica is behind, by the database's clock.",
            "replica",
            known.get("ages_s", {}),
        )
        yield _gauge(
            "replicas_of_a_shared_folder",
            "Replicas that run from a folder (registry.snapshot_dir) from which another one runs as well: it was copied.",
            known.get("twins"),
        )
        info = GaugeMetricFamily(
            "authbackend_build_info", "Always 1; labels tell what runs.", labels=["version", "python"]
        )
        info.add_metric([__version__, platform.python_version()], 1)
        yield info


class CertificateMetrics(Collector):
    """
    What the process that follows the database knows of certificates, authorities and revocation lists.

    Args:
        known: What :meth:`told` returned in another process.
    """

    def __init__(self, known: Callable[[], dict[str, Any] | None] = lambda: None) -> None:
        self._known = known
        self.within: dict[str, tuple[int, int, int]] = {}
        """By device type, ending within 7, 30 and 90 days."""
        self.expired: int | None = None
        self.most_on_a_day: int | None = None
        self.authorities: dict[str, float] = {}
        self.this_updates: dict[str, float] = {}
        self.next_updates: dict[str, float] = {}

    def told(self) -> dict[str, Any]:
        """Return what is known, as JSON values."""
        names = ("within", "expired", "most_on_a_day", "authorities", "this_updates", "next_updates")
        return {name: getattr(self, name) for name in names}

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges, for one scrape."""
        for name, value in (self._known() or {}).items():
            setattr(self, name, value)
        expiring = GaugeMetricFamily(
            "authbackend_certificates_expiring",
            "Active certificates that end within so many days (7, 30, 90; each counts those before) and have no successor, by device type (unknown: of no device).",
            labels=["days", "device_type"],
        )
        for device_type, numbers in self.within.items():
            for days, number in zip(("7", "30", "90"), numbers, strict=True):
                expiring.add_metric([days, device_type], number)
        yield expiring
        yield _gauge(
            "certificates_expired_active",
            "Active devices whose last certificate has ended: they cannot log in any more.",
            self.expired,
        )
        yield _gauge(
            "certificates_expiring_on_one_day",
            "The most certificates without a successor that end on one day of the next 90.",
            self.most_on_a_day,
        )
        yield _gauges(
            "authority_not_after_timestamp_seconds",
            "When the certificate of an authority ends.",
            "authority",
            self.authorities,
        )
        yield _gauges(
            "crl_this_update_timestamp_seconds",
            "When the revocation list of an authority was signed; while that is in the future, brokers refuse everybody.",
            "authority",
            self.this_updates,
        )
        yield _gauges(
            "crl_next_update_timestamp_seconds",
            "When the revocation list of an authority is too old, so that brokers refuse everybody.",
            "authority",
            self.next_updates,
        )


@dataclass(frozen=True, slots=True)
class Present:
    """What is true at this moment; ``workers`` by state, ``sizes`` by entity, ``memory_bytes`` taken and left."""

    state: State | None
    sizes: dict[str, int]
    workers: dict[str, int]
    restarts: int
    memory_bytes: tuple[int, int]


def _gauge(name: str, text: str, value: float | None) -> Metric:
    family = GaugeMetricFamily(f"authbackend_{name}", text, labels=[])
    if value is not None:
        family.add_metric([], value)
    return family


def _gauges(name: str, text: str, label: str, found: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(f"authbackend_{name}", text, labels=[label])
    for key, value in found.items():
        family.add_metric([key], value)
    return family
