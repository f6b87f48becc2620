"""The management API client passes the behaviour suite against the cluster in memory, served over HTTP."""

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
    """Implements ``cluster_behaviour.Environment``."""

    def __init__(self, broker: Broker, url: str, silent_url: str) -> None:
        self.broker = broker
        self.cluster = ManagementAPI(Access((url,), lambda: ("u", "p")))
        self.silent = ManagementAPI(Access((silent_url,), lambda: ("u", "p")))
        self.user, self.other = "APM1", "AGV1"

    async def connect(self, user: str, *filters: str) -> None:
        self.broker.connect(user, user, *filters, stored=True)

    async def queue_message(self, user: str, topic: str) -> None:
        del topic
        self.broker.subscribe(user, messages=1)


@pytest.fixture
async def environment() -> AsyncIterator[OverHTTP]:
    """A cluster in memory behind HTTP, and a port on which nothing listens."""
    broker = Broker()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        async with TestServer(application(broker)) as server:
            over_http = OverHTTP(broker, str(server.make_url("")), f"http://127.0.0.1:{bound.getsockname()[1]}")
            yield over_http
            await over_http.cluster.aclose()
            await over_http.silent.aclose()
