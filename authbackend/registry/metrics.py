"""What is counted of the copy of the registry, and of the replica."""

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
        yield gauge(
            "registry_version",
            "Upper end of the transactions that the copy contains (PostgreSQL transaction id).",
            None if state is None else state.position.xmax,
        )
        yield gauges("registry_entries", "Entries of the copy in memory.", "entity", now.sizes)
        taken, available = now.memory_bytes
        yield gauge("registry_memory_bytes", "Memory that the copy has, what it can use again included.", taken)
        yield gauge(
            "registry_memory_available_bytes",
            "Memory that is left in the file system of registry.memory_dir.",
            available,
        )
        yield gauge("registry_changed_timestamp_seconds", "When the copy last changed.", known.get("changed_at"))
        yield gauge(
            "registry_sync_age_seconds",
            "Time since the start of the last look at the database that succeeded; NaN before the first.",
            float("nan") if state is None else clocks.uptime() - state.synced_at,
        )
        yield gauge(
            "registry_on_disk", "1 if the copy on disk holds what the one in memory does.", known.get("lasting", False)
        )
        yield gauges("workers", "Workers by state: serving, starting, hanging.", "state", now.workers)
        yield gauge("worker_restarts", "How often a worker had to be started again.", now.restarts)
        yield gauges("replicas", "Replicas by state: live, silent, stopped.", "state", known.get("states", {}))
        yield gauges(
            "replica_sync_age_seconds",
            "How far each replica is behind, by the database's clock.",
            "replica",
            known.get("ages_s", {}),
        )
        yield gauge(
            "replicas_of_a_shared_folder",
            "Replicas that run from a folder (registry.snapshot_dir) from which another one runs as well: it was copied.",
            known.get("twins"),
        )
        info = GaugeMetricFamily(
            "authbackend_build_info", "Always 1; labels tell what runs.", labels=["version", "python"]
        )
        info.add_metric([__version__, platform.python_version()], 1)
        yield info


@dataclass(frozen=True, slots=True)
class Present:
    """What is true at this moment; ``workers`` by state, ``sizes`` by entity, ``memory_bytes`` taken and left."""

    state: State | None
    sizes: dict[str, int]
    workers: dict[str, int]
    restarts: int
    memory_bytes: tuple[int, int]
