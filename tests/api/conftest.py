"""The admin and health listeners in this process, with a registry written by the test, without a database."""

from __future__ import annotations

import json
import os

import pytest
from prometheus_client import CollectorRegistry

from authbackend import clocks, metrics
from authbackend.api.server import application
from authbackend.certificates.crl_endpoint import PublishedCrls
from authbackend.certificates.metrics import CertificateMetrics
from authbackend.policy.decide import DecisionSettings
from authbackend.registry.metrics import Present, RegistryMetrics, ReplicaMetrics
from authbackend.registry.position import FeedPosition
from authbackend.registry.records import DeviceRow, Patch
from authbackend.service.health import Health
from authbackend.service.health_listener import health_application
from authbackend.service.heartbeats import WorkerHeartbeats
from tests.support.registry import new_store

MARK = FeedPosition("epoch", "incarnation", "100:100:")
MAX_STALENESS_S = 900.0
TYPE = {
    "name": "APM",
    "client_ids": ["{device_id}", "{device_id}_*"],
    "vhosts": ["/"],
    "networks": None,
    "max_staleness_s": None,
    "rules": [
        [1, "allow", "publish", "fleet/{device_id}/telemetry/#", None],
        [2, "deny", "publish", "fleet/{device_id}/telemetry/raw", None],
        [3, "allow", "subscribe", "fleet/{device_id}/commands/#", None],
    ],
}


def device(name, status="active", other_id=None):
    """Return a device of the type APM, as the database would."""
    return DeviceRow(
        name.encode(), f"{status[0]}APM\t{other_id or ''}\t\t\t\t".encode(), other_id and other_id.encode()
    )


class Replica:
    """The state that the listeners show, which a test can change."""

    def __init__(self):
        self.store = new_store()
        self.heartbeats = WorkerHeartbeats(2)
        self.lists = PublishedCrls()
        self.certificates = CertificateMetrics()
        self.collected = CollectorRegistry()
        self.published = None
        self.counted = RegistryMetrics(self.collected, lambda published: setattr(self, "published", published))
        self.present = ReplicaMetrics(
            lambda: Present(
                self.store.state(),
                self.store.sizes(),
                self.heartbeats.states(),
                self.heartbeats.restarts,
                self.store.memory_bytes(),
            ),
            lambda: self.published,
        )

    def application(self, *, loopback=True):
        """Return the application of the admin listener."""
        return application(self.store.reader(), DecisionSettings(), loopback=loopback)

    def exposition(self):
        """Return the metrics in Prometheus' text format."""
        return metrics.exposition(self.collected, None, self.present, self.certificates)

    def health_application(self):
        """Return the application of the health listener."""
        health = Health(self.store.reader(), lambda: self.published, self.heartbeats, MAX_STALENESS_S)
        return health_application(lambda: self.exposition(), health, self.lists)

    def load(self, *devices, age_s=0.0):
        """Load a registry, as if ``age_s`` ago."""
        patch = Patch({"APM": json.dumps(TYPE).encode()}, {row.name.decode(): row for row in devices}, {})
        self.store.apply(patch, MARK, clocks.uptime() - age_s)

    def serve(self):
        """Record that all workers serve."""
        for worker in range(self.heartbeats.workers):
            self.heartbeats.beat(worker, os.getpid())


@pytest.fixture
def replica():
    """A replica that has loaded two devices and serves."""
    made = Replica()
    made.load(device("APM0001"), device("gone", "revoked", other_id="APM0009"))
    made.serve()
    return made


@pytest.fixture
def empty():
    """A replica that has not loaded anything yet."""
    return Replica()


@pytest.fixture
async def client(aiohttp_client, replica):
    """A client of the replica's health listener."""
    return await aiohttp_client(replica.health_application())
