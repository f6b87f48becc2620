"""Prometheus metrics of certificates, authorities and CRLs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from authbackend.metrics import gauge, gauges


class CertificateMetrics(Collector):
    """
    Metrics of certificates, authorities and CRLs, counted by the process that follows the database.

    Args:
        published: Returns what :meth:`told` returned in that process, for a collector in another one.
    """

    def __init__(self, published: Callable[[], dict[str, Any] | None] = lambda: None) -> None:
        self._published = published
        self.within: dict[str, tuple[int, int, int]] = {}
        """The number that end within 7, 30 and 90 days, by device type."""
        self.expired: int | None = None
        self.most_on_a_day: int | None = None
        self.authorities: dict[str, float] = {}
        self.this_updates: dict[str, float] = {}
        self.next_updates: dict[str, float] = {}

    def told(self) -> dict[str, Any]:
        """Return the metrics as JSON values, for another process."""
        names = ("within", "expired", "most_on_a_day", "authorities", "this_updates", "next_updates")
        return {name: getattr(self, name) for name in names}

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges, for one scrape."""
        for name, value in (self._published() or {}).items():
            setattr(self, name, value)
        expiring = GaugeMetricFamily(
            "authbackend_certificates_expiring",
            "Active certificates without a successor that end within this number of days (7, 30, 90; cumulative), by device type (unknown: of no device).",
            labels=["days", "device_type"],
        )
        for device_type, numbers in self.within.items():
            for days, number in zip(("7", "30", "90"), numbers, strict=True):
                expiring.add_metric([days, device_type], number)
        yield expiring
        yield gauge(
            "certificates_expired_active",
            "Active devices whose last certificate has ended: they cannot log in any more.",
            self.expired,
        )
        yield gauge(
            "certificates_expiring_on_one_day",
            "The most certificates without a successor that end on one day of the next 90.",
            self.most_on_a_day,
        )
        yield gauges(
            "authority_not_after_timestamp_seconds",
            "When the certificate of an authority ends.",
            "authority",
            self.authorities,
        )
        yield gauges(
            "crl_this_update_timestamp_seconds",
            "When the revocation list of an authority was signed; while that is in the future, brokers refuse everybody.",
            "authority",
            self.this_updates,
        )
        yield gauges(
            "crl_next_update_timestamp_seconds",
            "When the revocation list of an authority expires; from then on, brokers refuse everybody.",
            "authority",
            self.next_updates,
        )
