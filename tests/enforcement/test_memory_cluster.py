"""The cluster in memory passes the same behaviour suite as a real one."""

from __future__ import annotations

import pytest

from tests.support.cluster_behaviour import *  # noqa: F403 - the tests
from tests.support.memory_cluster import Broker, MemoryCluster


class InMemory:
    """Implements ``cluster_behaviour.Environment``."""

    def __init__(self) -> None:
        self.broker = Broker()
        self.cluster = MemoryCluster(self.broker)
        self.silent = MemoryCluster(Broker("silent", down=True))
        self.user, self.other = "APM1", "AGV1"

    async def connect(self, user: str, *filters: str) -> None:
        self.broker.connect(user, user, *filters, stored=True)

    async def queue_message(self, user: str, topic: str) -> None:
        del topic
        self.broker.subscribe(user, messages=1)


@pytest.fixture
def environment() -> InMemory:
    """A cluster in memory."""
    return InMemory()
