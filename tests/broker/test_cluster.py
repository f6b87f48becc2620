"""Enforcement on a cluster of three nodes with two replicas, when nodes and replicas fail."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from authbackend_load.connection import Connection

from .cluster import Cluster
from .conftest import ROOT, make_service
from .fleet import Fleet
from .identities import Certificates
from .mqtt import MQTTClient
from .processes import HarnessError, until
from .service import Database, Service
from .thin import connected

Clients = Callable[..., MQTTClient]
REFUSED, NOBODY_SUBSCRIBED = 0x86, 0x10
SESSION = {"clean": False, "session_expiry_s": 600}


@pytest.fixture(scope="module")
def cluster(workplace: Path, certificates: Certificates, service: Service) -> Iterator[Cluster]:
    """A running cluster of three nodes."""
    nodes = Cluster(Path(ROOT), workplace, certificates)
    try:
        nodes.start()
        yield nodes
    finally:
        nodes.close()


@pytest.fixture(scope="module")
def replicas(
    cluster: Cluster, workplace: Path, certificates: Certificates, database: Database, service: Service
) -> Iterator[list[Service]]:
    """Two replicas that enforce on the cluster: the one that the brokers use, and another."""
    second = make_service(workplace, certificates, database, broker_port=8083, health_port=8084)
    service.stop()
    for each in (service, second):
        each.enforce(cluster.management, sweep_interval_s="5")
        # A killed replica might still be answering for this long; until then, nothing is confirmed.
        each.configure(REGISTRY__MAX_STALENESS_S="10")
        each.start()
    yield [service, second]
    second.stop()
    service.stop()
    service.enforce("")
    service.configure(REGISTRY__MAX_STALENESS_S="")
    service.command("enforcement", "disable")
    service.start()


def tasks(service: Service, *arguments: str) -> list[dict[str, Any]]:
    """Return the output of ``enforcement list``."""
    listed: list[dict[str, Any]] = json.loads(
        service.command("enforcement", "list", "--limit", "1000", *arguments, "--json")
    )
    return listed


async def test_a_session_outlives_its_node_and_a_denial_stays_one(
    mqtt: Clients, fleet: Fleet, cluster: Cluster, replicas: list[Service]
) -> None:
    """After a node fails, its device continues on another one within seconds; a revoked device is refused there too."""
    me, revoked = fleet.device(), fleet.device()
    first, second = cluster.nodes[0], cluster.nodes[1]
    client = mqtt(me, port=first.doors.mqtt_tls, **SESSION)
    assert await client.connect() == 0
    assert await client.subscribe(f"fleet/{me}/telemetry/#") == [1]
    await fleet.change(f"update device set status = 'revoked' where device_id = '{revoked}'")
    await asyncio.to_thread(first.kill)
    try:
        assert await client.disconnected() is not None
        again = mqtt(me, port=second.doors.mqtt_tls, **SESSION)
        assert await again.connect() == 0
        assert again.session_present
        sender = mqtt(me, client_id=f"{me}_pub", port=second.doors.mqtt_tls)
        assert await sender.connect() == 0
        assert await sender.publish(f"fleet/{me}/telemetry/1", b"x") == 0
        assert (await again.message()).payload == b"x"
        assert await mqtt(revoked, port=second.doors.mqtt_tls).connect() == REFUSED
    finally:
        await asyncio.to_thread(first.start)


async def test_a_replica_that_dies_in_the_middle_of_two_hundred_revocations(
    certificates: Certificates, fleet: Fleet, cluster: Cluster, replicas: list[Service]
) -> None:
    """The other replica finishes all revocations completely."""
    names = [fleet.device() for _ in range(200)]
    ports = [node.doors.mqtt_tls for node in cluster.nodes]
    connections: list[Connection] = []
    for number, name in enumerate(names):
        connections.append(await connected(certificates.device(name), ports[number % 3], clean=False))
        assert await connections[-1].subscribe([f"fleet/{name}/commands/#"], 1) == (1,)
    enforcing = next(each for each in replicas if "enforcement_leading 1" in each.metrics())
    ended = asyncio.wait([each.lost for each in connections], return_when=asyncio.FIRST_COMPLETED)
    listed = ", ".join(f"'{name}'" for name in names)
    fleet.database.sql(f"update device set status = 'revoked' where device_id in ({listed})")
    await ended
    await asyncio.to_thread(enforcing.kill)
    left = [each for each in connections if not each.lost.done()]
    if enforcing is replicas[0]:
        await asyncio.to_thread(enforcing.start)  # the brokers use this one
    async with asyncio.timeout(60):
        await asyncio.gather(*(each.lost for each in connections))
    assert left, "all were closed before the replica was killed: it proves nothing"
    while open_ := await asyncio.to_thread(tasks, replicas[0], "--state", "open"):
        print([(task["name"], task["fault"], task["receipt"]) for task in open_[:3]])
        await asyncio.sleep(2)
    done = {task["name"]: task["receipt"] for task in tasks(replicas[0], "--state", "done")}
    assert set(names) <= set(done)
    queues = cluster.nodes[0].control("list_queues", "name").split()
    assert not [queue for queue in queues if any(name in queue for name in names)]
    if enforcing is not replicas[0]:
        await asyncio.to_thread(enforcing.start)


async def test_a_node_that_is_cut_off_is_named_until_it_has_been_seen(
    mqtt: Clients, fleet: Fleet, cluster: Cluster, replicas: list[Service]
) -> None:
    """Its connections are unknown, and the output says so; when it is back, the device is disconnected."""
    me = fleet.device()
    last = cluster.nodes[2]
    client = mqtt(me, port=last.doors.mqtt_tls)
    assert await client.connect() == 0
    await asyncio.to_thread(cluster.cut_off, last)
    try:
        with pytest.raises(HarnessError, match=r"exit status 8(?s:.)*rabbitmq3@localhost"):
            await asyncio.to_thread(replicas[0].command, "device", "revoke", me, "--wait", "--timeout", "5")
    finally:
        await asyncio.to_thread(cluster.join_again, last)
    await until(lambda: tasks(replicas[0], "--name", me)[0]["state"] == "done", 60)
    assert await client.disconnected(1) is not None
