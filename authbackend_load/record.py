"""The outcome of a load test, as counts and latencies of the devices of one process, or merged over all."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, Self

from authbackend_load.histogram import Histogram

LATENCIES = {
    "handshake": "TCP connection and TLS handshake",
    "connack": "CONNECT to CONNACK",
    "suback": "SUBSCRIBE to SUBACK",
    "puback": "PUBLISH to PUBACK",
    "cycle": "first attempt to the end of the cycle, including failed attempts",
    "refusal": "CONNECT to the refusal of a device that must be refused",
}


class Record:
    """
    Latencies, failures and verdicts.

    Attributes:
        latencies: By the names of :data:`LATENCIES`.
        failures: The number by step and cause.
        counts: ``attempts``, ``completed``, ``logins``, ``publishes``, ``messages``, ``lost``, ``wrongly_refused``
            (an active device, by CONNACK, SUBACK, PUBACK or a connection closed on a publish) and
            ``wrongly_let_in`` (any other device).
    """

    def __init__(self) -> None:
        self.latencies: defaultdict[str, Histogram] = defaultdict(Histogram)
        self.failures: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()

    def latency(self, name: str, duration_s: float) -> None:
        """Add a latency."""
        self.latencies[name].add(duration_s)

    def failure(self, step: str, cause: str) -> None:
        """Count a failure."""
        self.failures[f"{step}: {cause}"] += 1

    def count(self, name: str, by: int = 1) -> None:
        """Increase one of :attr:`counts`."""
        self.counts[name] += by

    def merge(self, other: Record) -> None:
        """Add the content of another record."""
        for name, histogram in other.latencies.items():
            self.latencies[name].merge(histogram)
        self.failures.update(other.failures)
        self.counts.update(other.counts)

    def as_dict(self) -> dict[str, Any]:
        """Return the record as plain values, for another process."""
        return {
            "latencies": {name: histogram.as_dict() for name, histogram in self.latencies.items()},
            "failures": dict(self.failures),
            "counts": dict(self.counts),
        }

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return the record that :meth:`as_dict` returned."""
        record = cls()
        for name, histogram in values["latencies"].items():
            record.latencies[name] = Histogram.of(histogram)
        record.failures.update(values["failures"])
        record.counts.update(values["counts"])
        return record

    def report(self) -> dict[str, Any]:
        """Return the figures for people: latencies in milliseconds, failures by cause, counts."""
        return {
            "latency_ms": {n: self.latencies[n].summary() for n in LATENCIES if n in self.latencies},
            "failures": dict(self.failures.most_common()),
            "counts": dict(sorted(self.counts.items())),
        }

    def distributions(self) -> dict[str, list[tuple[float, float]]]:
        """Return the cumulative distribution of each latency."""
        return {name: self.latencies[name].distribution() for name in LATENCIES if name in self.latencies}
