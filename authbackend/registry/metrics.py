"""Prometheus metrics of the copy of the registry, and of the replica."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from authbackend import __version__, clocks
from authbackend.metrics import gauge, gauges
from authbackend.registry.announcer import Peers
from authbackend.registry.follower import FeedRead, RefreshResult
from authbackend.registry.store import State

SYNC_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class RegistryMetrics:
    """
    Metrics of the follower process.

    Args:
        publish: Receives the state of the copy and of the other replicas, for :class:`ReplicaMetrics`.
    """

    def __init__(self, registry: CollectorRegistry, publish: Callable[[dict[str, Any]], object]) -> None:
        self._publish = publish
        self._state: dict[str, Any] = {}
        self._sync_metrics(registry)

    def _sync_metrics(self, registry: CollectorRegistry) -> None:
        self._sync_duration = Histogram(
            "authbackend_registry_sync_duration_seconds",
            "Duration of a read of the database, by kind: changes or full.",
            ["kind"],
            buckets=SYNC_BUCKETS_S,
            registry=registry,
        )
        self._sync_failures = Counter(
            "authbackend_registry_sync_failures", "Reads of the database that failed.", registry=registry
        )
        self._comparisons = Counter(
            "authbackend_registry_comparisons", "Comparisons of the whole copy with the database.", registry=registry
        )
        self._differences = Counter(
            "authbackend_registry_differences",
            "Rows in which the copy differed from the database; must be 0.",
            registry=registry,
        )
        self._ignored = Counter(
            "authbackend_registry_changes_ignored",
            "Changes of an entity that a newer schema has and this version does not support: upgrade the replica.",
            registry=registry,
        )
        self._gone = Counter(
            "authbackend_registry_served_changes_gone",
            "Entries that were served in a state that the database has lost, in a fail-over, a crash or a restore; the log names them.",
            registry=registry,
        )

    def ignored(self, changes: int) -> None:
        """Count changes of an entity that only a newer schema has."""
        self._ignored.inc(changes)

    def refreshed(self, _: FeedRead, refreshed: RefreshResult, *, lasting: bool) -> None:
        """Record a successful refresh."""
        self._sync_duration.labels("full" if refreshed.full else "changes").observe(refreshed.duration_s)
        state = {**self._state, "lasting": lasting, "fault": None}
        if refreshed.changed or refreshed.full:
            state["changed_at"] = time.time()
        self._update(state)

    def refresh_failed(self, fault: str) -> None:
        """Count a failed refresh, and publish why: before the first load the registry itself cannot say it."""
        self._sync_failures.inc()
        self._update({**self._state, "fault": fault})

    def compared(self, differences: int) -> None:
        """Count a comparison with the database, and the rows that differed."""
        self._comparisons.inc()
        self._differences.inc(differences)

    def served_changes_gone(self, number: int) -> None:
        """Count served changes that the database has lost."""
        self._gone.inc(number)

    def peers(self, peers: Peers) -> None:
        """Accept the latest state of the replicas."""
        self._update({**self._state, "states": peers.states, "ages_s": peers.ages_s, "twins": peers.twins})

    def _update(self, state: dict[str, Any]) -> None:
        if state != self._state:
            self._state = state
            self._publish(state)


class ReplicaMetrics(Collector):
    """
    Gauges of this replica, and of the others as listed in the database.

    Args:
        current: Returns the current state; called at each scrape.
        published: Returns what the follower process last published, None if it is not running.
    """

    def __init__(self, current: Callable[[], Present], published: Callable[[], dict[str, Any] | None]) -> None:
        self._current = current
        self._published = published

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges, for one scrape."""
        now = self._current()
        state = now.state
        published = self._published() or {}
        yield gauge(
            "registry_version",
            "Upper end of the transactions that the copy contains (PostgreSQL transaction id).",
            None if state is None else state.position.xmax,
        )
        yield gauges("registry_entries", "Entries of the copy in memory.", "entity", now.sizes)
        used, available = now.memory_bytes
        yield gauge("registry_memory_bytes", "Memory of the copy, including what it can reuse.", used)
        yield gauge(
            "registry_memory_available_bytes",
            "Free memory in the file system of registry.memory_dir.",
            available,
        )
        yield gauge("registry_changed_timestamp_seconds", "When the copy last changed.", published.get("changed_at"))
        yield gauge(
            "registry_sync_age_seconds",
            "Time since the start of the last successful read of the database; NaN before the first.",
            float("nan") if state is None else clocks.uptime() - state.synced_at,
        )
        yield gauge(
            "registry_on_disk",
            "1 if the copy on disk has the same content as the one in memory.",
            published.get("lasting", False),
        )
        yield gauges("workers", "Workers by state: serving, starting, hanging.", "state", now.workers)
        yield gauge("worker_restarts", "How often a worker had to be restarted.", now.restarts)
        yield gauges("replicas", "Replicas by state: live, silent, stopped.", "state", published.get("states", {}))
        yield gauges(
            "replica_sync_age_seconds",
            "How far each replica is behind, by the database's clock.",
            "replica",
            published.get("ages_s", {}),
        )
        yield gauge(
            "replicas_of_a_shared_folder",
            "Running replicas that share their registry.snapshot_dir with another one: the folder was copied.",
            published.get("twins"),
        )
        info = GaugeMetricFamily(
            "authbackend_build_info", "Always 1; the labels name the versions in use.", labels=["version", "python"]
        )
        info.add_metric([__version__, platform.python_version()], 1)
        yield info


@dataclass(frozen=True, slots=True)
class Present:
    """The current state of a replica: ``sizes`` by entity, ``workers`` by state, ``memory_bytes`` used and available."""

    state: State | None
    sizes: dict[str, int]
    workers: dict[str, int]
    restarts: int
    memory_bytes: tuple[int, int]
