"""Prometheus metrics of enforcement: implements the observer Protocols of ``leader``, ``batch`` and ``sweep``."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from authbackend.enforcement.clusters import Actions
from authbackend.enforcement.sweep import CAUSES, Report
from authbackend.enforcement.tasks import URGENT, Backlog

TOOK_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)


class EnforcementMetrics:
    """
    The metrics of one replica.

    Gauges are set by the leader only; those of other replicas are 0 or absent.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._leading = Gauge(
            "authbackend_enforcement_leading",
            "1 on the leader, the one replica that enforces; if no replica has 1, nothing is enforced.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._open = Gauge(
            "authbackend_enforcement_tasks",
            "Open tasks, by state: waiting (not started), checking (that nothing is left).",
            ["state"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._oldest = Gauge(
            "authbackend_enforcement_oldest_task_seconds",
            "Age of the oldest open task; 0 without one.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._holds = Gauge(
            "authbackend_enforcement_holds",
            "Devices whose logins are held while their sessions are repaired, by state: held, lifted (at the time limit, before the repair was done).",
            ["state"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._done = Counter("authbackend_enforcement_done", "Tasks done, by cause.", ["cause"], registry=registry)
        self._failures = Counter(
            "authbackend_enforcement_failures",
            "Tasks that failed and were postponed.",
            registry=registry,
        )
        self._took = Histogram(
            "authbackend_enforcement_duration_seconds",
            "Time from a change to the end of the last connection that it ends.",
            buckets=TOOK_BUCKETS_S,
            registry=registry,
        )
        self._add_obstacles(registry)
        self._add_results(registry)

    def _add_obstacles(self, registry: CollectorRegistry) -> None:
        self._lock_taken = Gauge(
            "authbackend_enforcement_lock_taken",
            "1 on a replica that waits for the leader's lock while a session that is not a replica's holds it, so that nothing is enforced.",
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
        self._overdue = Gauge(
            "authbackend_schedule_overdue",
            "Scheduled changes of devices that are late, usually because another session has locked the device's row.",
            registry=registry,
            multiprocess_mode="livesum",
        )

    def _add_results(self, registry: CollectorRegistry) -> None:
        self._clusters: set[str] = set()
        self._ended = Counter(
            "authbackend_enforcement_ended",
            "What was ended, by kind: connection, queue, subscription.",
            ["kind"],
            registry=registry,
        )
        self._findings = Gauge(
            "authbackend_sweep_findings",
            "Connections and sessions that the last sweep reported, by cluster and cause.",
            ["cluster", "cause"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._swept = Counter(
            "authbackend_sweep_ended",
            "Connections and sessions that sweeps ended, by cause.",
            ["cause"],
            registry=registry,
        )
        self._sweep_duration = Histogram(
            "authbackend_sweep_duration_seconds",
            "Time to sweep a cluster.",
            buckets=TOOK_BUCKETS_S,
            registry=registry,
        )
        self._sweep_failures = Counter("authbackend_sweep_failures", "Sweeps that failed.", registry=registry)

    def leads(self, leading: bool) -> None:
        """Set whether this replica is the leader; if not, clear what only the leader reports."""
        self._leading.set(leading)
        if not leading:
            self.backlog(Backlog({}, 0.0, 0, 0))
            for cluster in self._clusters:
                self._set_findings(cluster, Report())

    def lock_taken(self, taken: bool) -> None:
        """Set whether a session that is not a replica's holds the leader's lock."""
        self._lock_taken.set(taken)

    def backlog(self, backlog: Backlog) -> None:
        """Set what has not been done yet."""
        for state in ("waiting", "checking"):
            self._open.labels(state).set(backlog.tasks.get(state, 0))
        self._oldest.set(backlog.oldest_s)
        self._holds.labels("held").set(backlog.holds)
        self._holds.labels("lifted").set(backlog.overdue_holds)
        self._paused.labels("bulk").set(backlog.paused is not None)
        self._paused.labels("urgent").set(backlog.paused is not None and backlog.paused.stops(URGENT))
        self._overdue.set(len(backlog.overdue))

    def ended(self, actions: Actions) -> None:
        """Count closed connections, deleted queues and removed subscriptions."""
        self._ended.labels("connection").inc(sum(actions.closed.values()))
        self._ended.labels("queue").inc(len(actions.deleted))
        self._ended.labels("subscription").inc(len(actions.unbound))

    def enforced(self, causes: frozenset[str], seconds: float) -> None:
        """Count a finished plan; ``seconds`` from the change to the end of the last connection."""
        for cause in causes:
            self._done.labels(cause).inc()
        self._took.observe(seconds)

    def enforcement_failed(self, tasks: int) -> None:
        """Count tasks that failed and were postponed."""
        self._failures.inc(tasks)

    def swept(self, cluster: str, report: Report) -> None:
        """Set what a sweep found, and count what it ended."""
        self._clusters.add(cluster)
        self._set_findings(cluster, report)
        for cause, number in report.ended.items():
            self._swept.labels(cause).inc(number)
        self._sweep_duration.observe(report.duration_s)

    def _set_findings(self, cluster: str, report: Report) -> None:
        for cause in CAUSES:
            self._findings.labels(cluster, cause).set(report.found[cause])

    def sweep_failed(self) -> None:
        """Count a failed sweep."""
        self._sweep_failures.inc()
