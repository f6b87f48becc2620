"""Prometheus metrics of RabbitMQ's requests, of their connections, and of password checks."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from authbackend.policy.decide import Decision

REQUEST_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)

STALL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)

MOST_DECISIONS = 5_000

OTHER_TYPES = "(other)"
"""The device type of decisions beyond ``MOST_DECISIONS`` series; no type has this name."""


class BrokerMetrics:
    """Metrics of one worker."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._decisions = Counter(
            "authbackend_decisions",
            "Answers to RabbitMQ by endpoint, verdict, reason and device type (or account, unknown; (other) beyond 5,000 series).",
            ["endpoint", "verdict", "reason", "device_type"],
            registry=registry,
        )
        self._duration = Histogram(
            "authbackend_request_duration_seconds",
            "Time from the arrival of a request at the process to its answer, including the time it waited.",
            ["endpoint"],
            buckets=REQUEST_BUCKETS_S,
            registry=registry,
        )
        self.in_flight = Gauge(
            "authbackend_requests_in_flight",
            "Requests from RabbitMQ that wait for the rest of their body or for a password check.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.malformed = Counter(
            "authbackend_malformed_requests",
            "Requests denied because RabbitMQ would not send them, by cause.",
            ["endpoint", "cause"],
            registry=registry,
        )
        self.unknown_paths = Counter(
            "authbackend_unknown_paths",
            "Requests to an unknown path, answered 404; the log names the expected one.",
            registry=registry,
        )
        self.failures = Counter(
            "authbackend_request_failures",
            "Requests answered 503 because authbackend failed, by cause; never counted as a denial.",
            ["endpoint", "cause"],
            registry=registry,
        )
        self.shed = Counter(
            "authbackend_requests_shed",
            "Requests answered 503 immediately because they had waited too long.",
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
            "Connections closed by authbackend, by cause: too_many, slow.",
            ["cause"],
            registry=registry,
        )
        self.stalls = Histogram(
            "authbackend_event_loop_stall_seconds",
            "How late a worker's event loop was, measured ten times a second.",
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
        """Set the number of RabbitMQ's open connections."""
        self.connections.set(number)

    def connection_closed(self, cause: str) -> None:
        """Count a connection that the worker closed."""
        self.connections_closed.labels(cause).inc()

    def decided(self, endpoint: str, decision: Decision) -> None:
        """Count a decision."""
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
        """Record how long an answer took."""
        child = self._durations.get(endpoint)
        if child is None:
            child = self._durations[endpoint] = self._duration.labels(endpoint)
        child.observe(seconds)
