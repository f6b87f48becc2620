"""What enforcement counts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from authbackend.enforcement.clusters import Actions
from authbackend.enforcement.sweep import CAUSES, Report
from authbackend.enforcement.tasks import URGENT, Backlog

TOOK_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)


class EnforcementMetrics:
    """Counters, and the gauges of the one replica that enforces; those of the others are 0 or absent."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._leading = Gauge(
            "authbackend_enforcement_leading",
            "1 on the one replica that enforces; nothing is enforced where no replica has 1.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._open = Gauge(
            "authbackend_enforcement_tasks",
            "Changes that are not yet true for what is connected, by state: waiting, checking.",
            ["state"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._oldest = Gauge(
            "authbackend_enforcement_oldest_task_seconds",
            "Age of the oldest open task that is due; 0 without one.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._holds = Gauge(
            "authbackend_enforcement_holds",
            "Devices kept from logging in while their sessions are put right, by state: held, lifted (by the limit, before the work was done).",
            ["state"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._done = Counter("authbackend_enforcement_done", "Tasks done, by cause.", ["cause"], registry=registry)
        self._failures = Counter(
            "authbackend_enforcement_failures",
            "Tasks that could not be done when they were due, and were put off.",
            registry=registry,
        )
        self._took = Histogram(
            "authbackend_enforcement_duration_seconds",
            "Time from a change to the end of the last connection that it ends.",
            buckets=TOOK_BUCKETS_S,
            registry=registry,
        )
        self._what_is_held_up(registry)
        self._what_ended(registry)

    def _what_is_held_up(self, registry: CollectorRegistry) -> None:
        self._lock_taken = Gauge(
            "authbackend_enforcement_lock_taken",
            "1 on a replica that waits for the lock of enforcement while a session that is no replica holds it: nobody enforces.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._paused = Gauge(
            "authbackend_enforcement_paused",
            "1 while enforcement is paused, by lane: urgent, bulk.",
            ["lane"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._blocked = Gauge(
            "authbackend_schedule_overdue",
            "Scheduled changes of devices that are late; most often somebody keeps the device's row locked.",
            registry=registry,
            multiprocess_mode="livesum",
        )

    def _what_ended(self, registry: CollectorRegistry) -> None:
        self._clusters: set[str] = set()
        self._ended = Counter(
            "authbackend_enforcement_ended",
            "What was ended, by kind: connection, queue, subscription.",
            ["kind"],
            registry=registry,
        )
        self._found = Gauge(
            "authbackend_sweep_findings",
            "What the last sweep found that should not be there, by cluster and cause.",
            ["cluster", "cause"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._swept = Counter("authbackend_sweep_ended", "What sweeps ended, by cause.", ["cause"], registry=registry)
        self._sweep_duration = Histogram(
            "authbackend_sweep_duration_seconds",
            "Duration of the sweep of a cluster.",
            buckets=TOOK_BUCKETS_S,
            registry=registry,
        )
        self._sweep_failures = Counter(
            "authbackend_sweep_failures", "Sweeps that could not be done.", registry=registry
        )

    def leads(self, leading: bool) -> None:
        """Whether this replica is the one that enforces."""
        self._leading.set(leading)
        if not leading:
            self.backlog(Backlog({}, 0.0, 0, 0))
            for cluster in self._clusters:
                self._findings(cluster, Report())

    def lock_taken(self, taken: bool) -> None:
        """Whether a session that is no replica keeps this one from enforcing."""
        self._lock_taken.set(taken)

    def backlog(self, backlog: Backlog) -> None:
        """Take what is open."""
        for state in ("waiting", "checking"):
            self._open.labels(state).set(backlog.tasks.get(state, 0))
        self._oldest.set(backlog.oldest_s)
        self._holds.labels("held").set(backlog.holds)
        self._holds.labels("lifted").set(backlog.overdue_holds)
        self._paused.labels("bulk").set(backlog.paused is not None)
        self._paused.labels("urgent").set(backlog.paused is not None and backlog.paused.stops(URGENT))
        self._blocked.set(len(backlog.overdue))

    def ended(self, done: Actions) -> None:
        """Connections were closed, queues deleted, subscriptions removed."""
        self._ended.labels("connection").inc(sum(done.closed.values()))
        self._ended.labels("queue").inc(len(done.deleted))
        self._ended.labels("subscription").inc(len(done.unbound))

    def enforced(self, causes: frozenset[str], seconds: float) -> None:
        """A task is done; ``seconds`` from the change to the end of the last connection."""
        for cause in causes:
            self._done.labels(cause).inc()
        self._took.observe(seconds)

    def enforcement_failed(self, tasks: int) -> None:
        """Tasks could not be done now."""
        self._failures.inc(tasks)

    def swept(self, cluster: str, report: Report) -> None:
        """A cluster was compared."""
        self._clusters.add(cluster)
        self._findings(cluster, report)
        for cause, number in report.ended.items():
            self._swept.labels(cause).inc(number)
        self._sweep_duration.observe(report.duration_s)

    def _findings(self, cluster: str, report: Report) -> None:
        for cause in CAUSES:
            self._found.labels(cluster, cause).set(report.found[cause])

    def sweep_failed(self) -> None:
        """A sweep could not be done."""
        self._sweep_failures.inc()
