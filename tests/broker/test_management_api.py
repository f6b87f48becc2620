"""The management API of a real broker behaves as enforcement expects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest_asyncio

from authbackend.enforcement.management_api import Access, ManagementAPI
from tests.support.cluster_behaviour import *  # noqa: F403 - the tests

from .fleet import Fleet
from .identities import Certificates
from .mqtt import MQTTClient
from .node import Broker


class Real:
    """Implements ``cluster_behaviour.Environment``."""

    def __init__(
        self, broker: Broker, certificates: Certificates, fleet: Fleet, mqtt: Callable[..., MQTTClient]
    ) -> None:
        def api(port: int, name: str) -> ManagementAPI:
            access = Access(
                (f"https://{name}:{port}",), lambda: ("enforcer", "enforcer-password"), str(certificates.ca_file)
            )
            return ManagementAPI(access)

        self.cluster = api(broker.doors.management_tls, "localhost")
        self.silent = api(9, "127.0.0.1")
        self.user, self.other = fleet.device(), fleet.device()
        self._mqtt = mqtt

    async def connect(self, user: str, *filters: str) -> None:
        client = self._mqtt(user, clean=False, session_expiry_s=600)
        assert await client.connect() == 0
        if filters:
            assert await client.subscribe(*filters) == [1] * len(filters)

    async def queue_message(self, user: str, topic: str) -> None:
        sender = self._mqtt(user, client_id=f"{user}_pub")
        assert await sender.connect() == 0
        assert await sender.publish(topic, b"x") == 0
        await sender.disconnect()


@pytest_asyncio.fixture
async def environment(
    broker: Broker, certificates: Certificates, fleet: Fleet, mqtt: Callable[..., MQTTClient]
) -> AsyncIterator[Real]:
    """A real node, with devices of the fleet."""
    real = Real(broker, certificates, fleet, mqtt)
    yield real
    await real.cluster.aclose()
    await real.silent.aclose()
    await asyncio.sleep(0)
