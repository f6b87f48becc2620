"""A sweep that was incomplete reports so, instead of reporting no violations."""

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

    def __init__(self, *pages):
        self.closed = []
        self.pages = pages or ([live("R", "R")],)

    async def connections(self):
        for page in self.pages:
            yield page

    async def queues(self, pattern=None):
        yield []

    async def close_connection(self, name):
        self.closed.append(name)
        return name != "gone"


class StoreWithoutCertificates:
    async def certificates_on_record(self, serials, names):
        return []

    async def paused(self):
        return None

    def swept(self, cluster, report):
        pass


def sweep(age_s, cluster, store=None):
    settings = SweepSettings(60.0, frozenset({"device_not_permitted"}))
    return Sweep(
        store or StoreWithoutCertificates(),
        ClusterActions(cluster, 1000, 1),
        Reader(age_s),
        StoreWithoutCertificates(),
        DecisionSettings(),
        settings,
    )


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


async def test_what_is_not_told_closes_nobody_and_leaves_room_for_what_is_certain():
    cluster = Cluster([live("A", name=f"untold {n}") for n in range(300)], [live("R", name="revoked", protocol="")])
    report = await sweep(1.0, cluster).once()
    assert (report.found["incomplete_facts"], report.found["device_not_permitted"]) == (300, 1)
    assert cluster.closed == ["revoked"]
    assert report.ended == {"device_not_permitted": 1}
    assert report.entries[-1]["connection"] == "revoked"


async def test_a_broker_that_tells_no_serial_number_is_asked_about_by_name():
    asked = []

    class Store(StoreWithoutCertificates):
        async def certificates_on_record(self, serials, names):
            asked.append((serials, names))
            return []

    with_serial, without_serial = (
        live("A", "A", certificate_subject="CN=A", certificate_serial=text) for text in ("00:AB", None)
    )
    cluster = Cluster([with_serial], [without_serial], [live("A", "A")])
    await sweep(1.0, cluster, Store()).once()
    assert asked == [(["ab"], []), ([], ["A"]), ([], [])]


async def test_a_connection_that_went_by_itself_is_not_told_as_ended():
    report = await sweep(1.0, Cluster([live("R", "R", name="gone")])).once()
    assert (report.found["device_not_permitted"], report.ended["device_not_permitted"]) == (1, 0)
