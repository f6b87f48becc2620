"""Fixtures: a real PostgreSQL, a registry copy that follows it, the real leader, and clusters in memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest

from authbackend.backoff import Reachability
from authbackend.enforcement import fan_out
from authbackend.enforcement.clusters import Actions
from authbackend.enforcement.inventory import ByNameInventory, ListedInventory
from authbackend.enforcement.leader import Leader, LeaderSettings
from authbackend.enforcement.sweep import Report, SweepSettings
from authbackend.enforcement.tasks import Backlog
from authbackend.policy.decide import DecisionSettings
from authbackend.postgres.connection import Target
from authbackend.postgres.enforcement import PostgresTaskStore, leading, open_store
from authbackend.postgres.listener import Listener
from authbackend.postgres.replicas import Identity, PostgresReplicaTable
from authbackend.registry.announcer import Peers, ReplicaAnnouncer
from authbackend.registry.identity import Boot
from authbackend.registry.store import Store
from tests.support.memory_cluster import Broker, MemoryCluster
from tests.support.registry import Following, following

FLEET = """
insert into device_type (name, client_ids, vhosts) values ('T', '{"{device_id}","{device_id}_*"}', '{/}');
insert into topic_rule (device_type, effect, action, topic)
values ('T', 'allow', 'publish', 'fleet/{device_id}/#'), ('T', 'allow', 'subscribe', 'fleet/{device_id}/#'), ('T', 'allow', 'subscribe', 'news/#');
"""

MARKER = "marker_of_tests"
"""The channel of a notification that only marks a place in the order of all notifications."""


class RecordingObserver:
    """A leader's observer that records what tests look at."""

    def __init__(self) -> None:
        self.leading = False
        self.failed = 0
        self.last_backlog: Backlog | None = None
        self.reports: list[Report] = []

    def leads(self, leading: bool) -> None:
        self.leading = leading

    def backlog(self, backlog: Backlog) -> None:
        self.last_backlog = backlog

    def ended(self, actions: Actions) -> None:
        pass

    def enforced(self, causes: frozenset[str], seconds: float) -> None:
        pass

    def enforcement_failed(self, tasks: int) -> None:
        self.failed += tasks

    def swept(self, cluster: str, report: Report) -> None:
        self.reports.append(report)

    def sweep_failed(self) -> None:
        pass


class Rig:
    """Everything that a test of enforcement needs: database, copy, clusters and leader."""

    def __init__(self, dsn: str, connection: asyncpg.Connection) -> None:
        self.dsn = dsn
        self.sql = connection
        self.brokers: dict[str, Broker] = {}
        self.observer = RecordingObserver()
        self.copy: Following | None = None
        self._markers: dict[str, Listener] = {}

    @property
    def broker(self) -> Broker:
        """The only broker."""
        (only,) = self.brokers.values()
        return only

    async def devices(self, *names: str) -> None:
        """Register devices of type T, and wait until the copy has them."""
        await self.sql.execute("insert into device (device_id, type) select unnest($1::text[]), 'T'", list(names))
        await self.refresh_copy()

    async def refresh_copy(self) -> None:
        """Bring the copy up to date with what is committed."""
        assert self.copy is not None
        async with self.copy.copy._looking:  # the follower also refreshes in the background
            await self.copy.copy.refresh()

    async def set_status(self, status: str, *names: str) -> None:
        """Change the status of devices."""
        await self.sql.execute("update device set status = $1 where device_id = any ($2)", status, list(names))

    async def tasks(self, condition: str = "true") -> list[dict[str, Any]]:
        """Return the tasks that meet an SQL condition, the oldest first."""
        rows = await self.sql.fetch(f"select * from enforcement where {condition} order by id")
        return [{**row, "receipt": json.loads(row["receipt"] or "null")} for row in rows]

    async def finished(self, condition: str = "true", limit_s: float = 30.0) -> list[dict[str, Any]]:
        """Wait until all tasks that meet an SQL condition are finished, and return them."""
        async with asyncio.timeout(limit_s):
            while await self.sql.fetchval(
                f"select count(*) from enforcement where finished_at is null and ({condition})"
            ):
                await asyncio.sleep(0.02)
        return await self.tasks(condition)

    @contextlib.asynccontextmanager
    async def _open_store(self, part: str) -> AsyncIterator[PostgresTaskStore]:
        """Open the store of a part of the leader; its connection also listens on a channel that only tests use."""
        async with open_store(Target(self.dsn), part) as store:
            self._markers[part] = Listener(store._connection)
            await self._markers[part].listen(MARKER)
            yield store

    async def has_heard(self, part: str) -> None:
        """Wait until a part of the leader has received all notifications of the transactions committed so far."""
        await self.sql.execute(f"notify {MARKER}")  # a connection receives notifications in the order of commits
        assert await self._markers[part].wait(20.0)

    def leader(self, store: Store, sweep_s: float | None = None, per_second: float = 1000.0) -> Leader:
        """Return a leader that uses a copy of the registry."""
        target = Target(self.dsn)

        def opener(broker: Broker) -> Callable[[], MemoryCluster]:
            return lambda: MemoryCluster(broker)

        clusters = {name: opener(broker) for name, broker in self.brokers.items()}
        closes = frozenset({"device_not_permitted", "wrong_client_id"} if sweep_s else ())
        settings = LeaderSettings(clusters, per_second, DecisionSettings(), SweepSettings(sweep_s or 3600.0, closes))
        return Leader(
            lambda: leading(target, 30.0, list(clusters)),
            self._open_store,
            store,
            self.observer,
            settings,
            Reachability(),
        )

    @contextlib.asynccontextmanager
    async def enforcing(self, sweep_s: float | None = None, per_second: float = 1000.0) -> AsyncIterator[None]:
        """
        Run the leader for the duration of the block.

        Args:
            sweep_s: The sweep's interval; None if sweeps end nothing, so that only lanes do.
        """
        assert self.copy is not None
        leader = self.leader(self.copy.store, sweep_s, per_second)
        task = asyncio.create_task(leader.run())
        try:
            async with asyncio.timeout(10):
                while self.observer.last_backlog is None:
                    await asyncio.sleep(0.01)
            yield
            assert not task.done(), task.exception()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def rig(
    dsn: str, connection: asyncpg.Connection, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Rig]:
    """
    A registry with device type T and no device, and a copy that follows it.

    ``@pytest.mark.clusters`` names the clusters. Delays between looks are short, because a cluster in memory lists new
    connections immediately unless a test says otherwise.
    """
    monkeypatch.setattr(ByNameInventory, "look_again_s", 0.1)
    monkeypatch.setattr(ListedInventory, "look_again_s", 0.1)
    monkeypatch.setattr(fan_out, "LOOK_AGAIN_S", 0.1)
    monkeypatch.setattr(fan_out, "STATISTICS_LATE_S", 0.1)
    rig = Rig(dsn, connection)
    marker = request.node.get_closest_marker("clusters")
    rig.brokers = {name: Broker(name) for name in (marker.args if marker else ("rabbit",))}
    await connection.execute(FLEET)
    await connection.execute("insert into enforcement_setup (hold_limit_s) values (30)")
    await connection.executemany(
        "insert into enforcement_cluster (name) values ($1)", [(name,) for name in rig.brokers]
    )
    rig.copy = Following(dsn)
    try:
        async with announced(rig.copy, dsn), following(rig.copy.copy):
            await rig.refresh_copy()
            yield rig
    finally:
        await rig.copy.feed.close()


@contextlib.asynccontextmanager
async def announced(copy: Following, dsn: str) -> AsyncIterator[None]:
    """Announce in the database which version the copy serves, as a replica does."""
    identity = Identity(Boot(uuid.uuid4()), "me", "0", 1, 600.0)
    copy.feed._identity = identity
    announcer = ReplicaAnnouncer(
        PostgresReplicaTable(Target(dsn), identity), IgnoringObserver(), Reachability(), comes_back=False
    )
    copy.observed.refreshed = lambda feed_read, _refreshed, *, lasting: announcer.serves(feed_read)  # type: ignore[method-assign]
    task = asyncio.create_task(announcer.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await announcer.leave()


class IgnoringObserver:
    """An announcer's observer that ignores the other replicas."""

    def peers(self, peers: Peers) -> None:
        pass
