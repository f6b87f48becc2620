"""The management client passes against the cluster in memory, served over HTTP, what it passes against a real one."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import pytest
from aiohttp.test_utils import TestServer

from authbackend.enforcement.management_api import Access, ManagementAPI
from tests.support.cluster_behaviour import *  # noqa: F403 - the tests
from tests.support.management_server import application
from tests.support.memory_cluster import Broker


class OverHTTP:
    """Implements ``cluster_behaviour.Stage``."""

    def __init__(self, broker: Broker, url: str, nobody: str) -> None:
        self.broker = broker
        self.cluster = ManagementAPI(Access((url,), lambda: ("u", "p")))
        self.silent = ManagementAPI(Access((nobody,), lambda: ("u", "p")))
        self.user, self.other = "APM1", "AGV1"

    async def connect(self, user: str, *filters: str) -> None:
        self.broker.connect(user, user, *filters, stored=True)

    async def queue_message(self, user: str, topic: str) -> None:
        del topic
        self.broker.subscribe(user, messages=1)


@pytest.fixture
async def stage() -> AsyncIterator[OverHTTP]:
    """A cluster in memory behind HTTP, and a port at which nobody listens."""
    broker = Broker()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        async with TestServer(application(broker)) as server:
            made = OverHTTP(broker, str(server.make_url("")), f"http://127.0.0.1:{bound.getsockname()[1]}")
            yield made
            await made.cluster.aclose()
            await made.silent.aclose()
