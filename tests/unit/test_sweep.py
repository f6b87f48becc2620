"""A sweep says that it was not done rather than that nothing was found."""

import pytest

from authbackend.enforcement.clusters import ClusterActions
from authbackend.enforcement.sweep import Sweep, SweepSettings
from authbackend.errors import Unavailable
from authbackend.policy.decide import DecisionSettings
from tests.unit.test_checks import live, registry


class Reader:
    def __init__(self, age_s):
        self.registry = registry()
        self.registry.age_s = age_s

    def __enter__(self):
        return self.registry

    def __exit__(self, *_):
        pass


class Cluster:
    name = "c"

    def __init__(self):
        self.closed = []

    async def connections(self):
        yield [live("R", "R")]

    async def queues(self, pattern=None):
        yield []

    async def close_connection(self, name):
        self.closed.append(name)


class Told:
    async def certificate_states(self, serials):
        return {}

    async def paused(self):
        return None

    def swept(self, cluster, report):
        pass


def sweep(age_s, cluster):
    settings = SweepSettings(60.0, frozenset({"device_not_permitted"}))
    return Sweep(Told(), ClusterActions(cluster, 1000, 1), Reader(age_s), Told(), DecisionSettings(), settings)


async def test_a_revoked_device_that_is_connected_is_found_and_closed():
    cluster = Cluster()
    report = await sweep(1.0, cluster).once()
    assert report.found["device_not_permitted"] == 1
    assert cluster.closed == ["x"]


async def test_a_copy_that_is_old_neither_closes_nor_says_that_all_is_well():
    cluster = Cluster()
    with pytest.raises(Unavailable, match="31 s old: nothing was compared"):
        await sweep(31.0, cluster).once()
    assert cluster.closed == []
