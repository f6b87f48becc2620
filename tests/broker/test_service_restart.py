"""Restarts of the service, the broker and PostgreSQL while devices are connected."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from . import balancer
from .conftest import make_service
from .fleet import Fleet
from .identities import Certificates
from .mqtt import HOST, Disconnected, MQTTClient, connect_all
from .node import Broker
from .processes import Process, until
from .service import Database, Service

Clients = Callable[..., MQTTClient]
REFUSED, NOBODY_SUBSCRIBED = 0x86, 0x10


@asynccontextmanager
async def background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run a coroutine for the duration of the block; if it fails, the block ends with its error."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(work)
        yield
        task.cancel()


async def test_the_service_is_restarted(mqtt: Clients, fleet: Fleet) -> None:
    """
    Subscribers stay connected, and so do publishers to recently used topics. On a publish to a new topic during the
    restart, RabbitMQ ends the connection, refuses the next login, and allows it when the service is back.
    """
    me = fleet.device()
    reader, steady, unlucky = (mqtt(me, client_id=f"{me}_{name}") for name in ("reader", "steady", "unlucky"))
    assert await connect_all(reader, steady, unlucky) == [0, 0, 0]
    assert await reader.subscribe(f"fleet/{me}/telemetry/#") == [1]

    async def publish_steadily() -> None:
        while True:
            assert await steady.publish(f"fleet/{me}/telemetry/steady", b"steady") == 0
            await asyncio.sleep(0.1)

    async with background(publish_steadily()):
        assert (await reader.message()).payload == b"steady"
        await asyncio.to_thread(fleet.service.stop)
        with pytest.raises(Disconnected):
            await unlucky.publish(f"fleet/{me}/telemetry/new", b"lost")
        assert await mqtt(me, client_id=f"{me}_unlucky").connect() == REFUSED
        assert reader.connected
        reader.messages()
        assert (await reader.message()).payload == b"steady"
        await asyncio.to_thread(fleet.service.start)
        back = mqtt(me, client_id=f"{me}_unlucky")
        assert await back.connect() == 0
    reader.messages()
    assert await back.publish(f"fleet/{me}/telemetry/new", b"back") == 0
    assert (await reader.message()).payload == b"back"


async def test_the_broker_is_restarted(mqtt: Clients, broker: Broker, fleet: Fleet) -> None:
    """Devices reconnect to their sessions, and their queued messages have survived."""
    me = fleet.device()
    sleeper = mqtt(me, clean=False, session_expiry_s=600)
    writer = mqtt(me, client_id=f"{me}_pub")
    assert await connect_all(sleeper, writer) == [0, 0]
    assert await sleeper.subscribe(f"fleet/{me}/telemetry/#") == [1]
    await sleeper.disconnect()
    assert await writer.publish(f"fleet/{me}/telemetry/x", b"queued") == 0
    await asyncio.to_thread(broker.stop)
    await writer.disconnected()
    await asyncio.to_thread(broker.start)
    awake = mqtt(me, clean=False, session_expiry_s=600)
    assert await awake.connect() == 0
    assert awake.session_present
    assert (await awake.message()).payload == b"queued"
    with pytest.raises(Disconnected):
        await awake.publish(f"fleet/{fleet.device()}/telemetry/x", b"denied")


async def test_the_database_is_down(mqtt: Clients, fleet: Fleet) -> None:
    """Decisions continue from memory; a change made afterwards takes effect."""
    me, revoked = fleet.device(), fleet.device()
    await fleet.change(f"update device set status = 'revoked' where device_id = '{revoked}'")
    await asyncio.to_thread(fleet.database.server.stop, "immediate")
    try:
        client = mqtt(me)
        assert await connect_all(client, mqtt(revoked)) == [0, REFUSED]
        assert await client.publish(f"fleet/{me}/telemetry/x", b"x") == NOBODY_SUBSCRIBED
        with pytest.raises(Disconnected):
            await client.publish(f"fleet/{revoked}/telemetry/x", b"x")
    finally:
        await asyncio.to_thread(fleet.database.server.start)
    await fleet.change(f"update device set status = 'active' where device_id = '{revoked}'")
    assert await mqtt(revoked).connect() == 0


async def test_the_service_starts_without_its_database(mqtt: Clients, fleet: Fleet) -> None:
    """It cannot decide until it has loaded the registry, so nobody can log in; afterwards, everybody can."""
    me = fleet.device()
    await asyncio.to_thread(fleet.service.stop)
    await asyncio.to_thread(fleet.database.server.stop)
    try:
        start = asyncio.create_task(asyncio.to_thread(fleet.service.start))
        await until(lambda: _accepts(fleet.service.broker_port))
        assert await mqtt(me).connect() == REFUSED
        assert not start.done()
    finally:
        await asyncio.to_thread(fleet.database.server.start)
    await start
    assert await mqtt(me).connect() == 0


def _accepts(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest_asyncio.fixture
async def replicas(
    workplace: Path, certificates: Certificates, database: Database, service: Service
) -> AsyncIterator[list[Service]]:
    """Replace the service by two replicas behind haproxy for the duration of a test."""
    pair = [make_service(workplace, certificates, database, broker_port=8090 + n, health_port=8190 + n) for n in (1, 2)]
    await asyncio.to_thread(service.stop)
    haproxy: Process | None = None
    try:
        await asyncio.gather(*(asyncio.to_thread(replica.start) for replica in pair))
        haproxy = balancer.start(workplace, pair)
        await until(lambda: _accepts(8080) and balancer.servers_up(workplace) == 2)
        yield pair
    finally:
        if haproxy is not None:
            haproxy.kill()
        await asyncio.gather(*(asyncio.to_thread(replica.stop) for replica in pair))
        await asyncio.to_thread(service.start)


class Traffic:
    """Three devices keep publishing to new topics, and one keeps logging in; each starts again after a refusal."""

    DEVICES = 4

    def __init__(self, mqtt: Clients, fleet: Fleet) -> None:
        self._mqtt = mqtt
        self._devices = [fleet.device() for _ in range(self.DEVICES)]
        self.publishes = self.logins = self.refusals = 0

    async def run(self) -> None:
        """Run until cancelled."""
        first, *others = self._devices
        async with asyncio.TaskGroup() as group:
            group.create_task(self._log_in(first))
            for device in others:
                group.create_task(self._publish(device))

    async def went_on(self) -> None:
        """Wait until each device has made progress."""
        publishes, logins = self.publishes + 50, self.logins + 3
        await until(lambda: self.publishes > publishes and self.logins > logins)

    async def _connect(self, device: str) -> MQTTClient:
        while True:
            client = self._mqtt(device)
            if await client.connect() == 0:
                return client
            self.refusals += 1

    async def _log_in(self, device: str) -> None:
        while True:
            client = await self._connect(device)
            await client.disconnect()
            self.logins += 1

    async def _publish(self, device: str) -> None:
        client = await self._connect(device)
        for number in itertools.count():
            try:
                assert await client.publish(f"fleet/{device}/telemetry/{number}", b"x") == NOBODY_SUBSCRIBED
                self.publishes += 1
            except Disconnected:
                self.refusals += 1
                client = await self._connect(device)


async def _busy_one(replicas: list[Service]) -> Service:
    """Return the replica that RabbitMQ uses: it keeps connections open, so all requests may go to one replica."""

    def requests() -> list[int]:
        return [replica.count("authbackend_decisions", verdict="allow") for replica in replicas]

    before = requests()
    await until(lambda: requests() != before)
    more = [after - old for after, old in zip(requests(), before, strict=True)]
    return replicas[more.index(max(more))]


async def test_one_of_two_replicas_is_restarted_and_nobody_notices(
    mqtt: Clients, fleet: Fleet, replicas: list[Service], workplace: Path
) -> None:
    """The replica in use is restarted twice, so each one once: publishes and logins continue without a refusal."""
    traffic = Traffic(mqtt, fleet)
    async with background(traffic.run()):
        await traffic.went_on()
        stopped = []
        for _ in range(2):
            stopped.append(busy := await _busy_one(replicas))
            await asyncio.to_thread(busy.stop)
            await traffic.went_on()
            await asyncio.to_thread(busy.start)
            await until(lambda: balancer.servers_up(workplace) == 2)  # ready, and the balancer has noticed
        assert stopped[0] is not stopped[1]
    assert traffic.refusals == 0


async def test_one_of_two_replicas_crashes(mqtt: Clients, fleet: Fleet, replicas: list[Service]) -> None:
    """Only requests in flight can be refused, once; afterwards the other replica answers."""
    traffic = Traffic(mqtt, fleet)
    async with background(traffic.run()):
        await traffic.went_on()
        await asyncio.to_thread((await _busy_one(replicas)).kill)
        await traffic.went_on()
        await traffic.went_on()
    assert traffic.refusals <= Traffic.DEVICES
