"""Follow the registry of a test database with the real change feed, and compare the copy with the database."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg

from authbackend.policy.model import Device, DeviceType
from authbackend.postgres.change_feed import ChangeFeed
from authbackend.postgres.connection import Target
from authbackend.registry import records
from authbackend.registry.follower import FeedRead, RefreshResult, RegistryFollower, SyncTimes
from authbackend.registry.position import FeedPosition
from authbackend.registry.records import Patch
from authbackend.registry.snapshot import SnapshotFolder
from authbackend.registry.store import Store
from tests.support.postgres import connected

Contents = tuple[dict[bytes, bytes], dict[str, bytes], dict[str, bytes]]


def new_store() -> Store:
    """Return an empty store in memory; its folder is deleted with the object."""
    folder = Path(tempfile.mkdtemp(prefix="authbackend-test-", dir="/dev/shm"))
    store = Store(folder)
    weakref.finalize(store, shutil.rmtree, folder, ignore_errors=True)
    return store


@dataclass
class Observed:
    """A follower's observer that records everything."""

    looks: list[FeedRead] = field(default_factory=list)
    refreshes: list[RefreshResult] = field(default_factory=list)
    lasting: list[bool] = field(default_factory=list)
    failures: int = 0
    comparisons: list[int] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)

    def refreshed(self, feed_read: FeedRead, refreshed: RefreshResult, *, lasting: bool) -> None:
        self.looks.append(feed_read)
        self.refreshes.append(refreshed)
        self.lasting.append(lasting)

    def refresh_failed(self, fault: str) -> None:
        del fault
        self.failures += 1

    def compared(self, differences: int) -> None:
        self.comparisons.append(differences)

    def served_changes_gone(self, number: int) -> None:
        self.gone.append(number)


class CheckedFeed(ChangeFeed):
    """The real change feed, which also reads the whole registry at each refresh, in the same snapshot."""

    truth: Contents | None = None

    async def _changes(
        self, connection: Any, old: FeedPosition, new: FeedPosition, floor: int, devices: int
    ) -> Patch | None:
        patch = await super()._changes(connection, old, new, floor, devices)
        found: dict[bytes, bytes] = {}
        async for chunk in self._chunks(connection, self._statements.all_devices.sql):
            found.update((row["name"], row["record"]) for row in chunk)
        few = [
            {row["name"]: row["record"] for row in await self._fetch(connection, statement)}
            for statement in ("all_device_types", "all_accounts")
        ]
        self.truth = (found, few[0], few[1])
        return patch


class Following:
    """
    A copy of the registry with its change feed and observer, refreshed on demand or in the background.

    Args:
        dsn: The database.
        feed: The change feed; the real one by default.
    """

    def __init__(
        self,
        dsn: str,
        feed: ChangeFeed | None = None,
        times: SyncTimes | None = None,
        snapshot_folder: SnapshotFolder | None = None,
    ) -> None:
        self.dsn = dsn
        self.feed = feed or ChangeFeed(Target(dsn))
        self.observed = Observed()
        self.store = new_store()
        self.copy = RegistryFollower(self.feed, self.store, self.observed, times, snapshot_folder)

    @property
    def loaded(self) -> bool:
        return self.store.state() is not None

    @property
    def position(self) -> FeedPosition:
        state = self.store.state()
        assert state is not None
        return state.position

    def device(self, device_id: str) -> Device | None:
        with self.store.reader() as reader:
            return reader.device_by_id(device_id)

    def device_type(self, name: str) -> DeviceType | None:
        with self.store.reader() as reader:
            return reader.device_type(name)

    def all_devices(self) -> list[Device]:
        with self.store.reader() as reader:
            return [records.device(bytes(name).decode(), bytes(record)) for name, record in reader.rows()]

    def devices(self) -> dict[str, tuple[str, str, str]]:
        """Return common name, type and status of each device by its id; also assert that both indexes agree."""
        found = {str(one.device_id): (one.common_name, one.type, str(one.status)) for one in self.all_devices()}
        for device_id, (common_name, *_) in found.items():
            by_id = self.device(device_id)
            assert by_id is not None
            assert by_id.common_name == common_name
        with self.store._env.begin() as transaction:
            ids = {bytes(key).decode() for key, _ in transaction.cursor(self.store._ids)}
        assert ids == {key for key, (name, *_) in found.items() if key != name}
        return found

    async def agrees(self) -> bool:
        """Return whether the copy equals the database now."""
        async with connected(self.dsn) as connection:
            devices = {
                row[0]: tuple(row[1:])
                for row in await connection.fetch("select device_id, common_name, type, status from device")
            }
        fresh, _ = await loaded(ChangeFeed(Target(self.dsn)))
        return self.devices() == devices and contents(self.store) == contents(fresh)


async def loaded(feed: ChangeFeed) -> tuple[Store, FeedRead]:
    """Load a new store, and close the feed's connection."""
    store = new_store()
    try:
        return store, await feed.load(store, 1.0)
    finally:
        await feed.close()


def contents(store: Store) -> Contents:
    """Return everything in a store, for comparison."""
    with store._env.begin() as transaction:
        devices = {bytes(key): bytes(value) for key, value in transaction.cursor(store._devices)}
        types, accounts = (
            {bytes(key).decode(): bytes(value) for key, value in transaction.cursor(table)}
            for table in (store._types, store._accounts)
        )
    return devices, types, accounts


@contextlib.asynccontextmanager
async def copied(dsn: str, feed: ChangeFeed | None = None, times: SyncTimes | None = None) -> AsyncIterator[Following]:
    """Load a copy for the duration of the block, then close its connection."""
    following = Following(dsn, feed, times)
    try:
        await following.copy.refresh()
        yield following
    finally:
        await following.feed.close()


class DeafFeed(ChangeFeed):
    """The real change feed, but without notifications."""

    @contextlib.asynccontextmanager
    async def wake_ups(self) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        async with super().wake_ups():
            yield asyncio.Event().wait  # type: ignore[misc]


async def fleet(connection: asyncpg.Connection, number: int = 3) -> None:
    """Commit a device type, an account, two rules, and devices d1, d2 and so on."""
    await connection.execute(
        "insert into device_type (name, client_ids, vhosts) values ('agv', array['{device_id}'], array['/'])"
    )
    await connection.execute("insert into account (name, login) values ('robot', 'certificate')")
    await connection.execute(
        "insert into device (device_id, common_name, type) select 'd' || n, 'd' || n, 'agv' from generate_series(1, $1) n",
        number,
    )
    await connection.execute(
        "insert into topic_rule (device_type, effect, action, topic) values ('agv', 'allow', 'publish', 'fleet/{device_id}/#')"
    )
    await connection.execute(
        "insert into topic_rule (account, effect, action, topic) values ('robot', 'allow', 'subscribe', 'fleet/#')"
    )


@contextlib.asynccontextmanager
async def following(copy: RegistryFollower) -> AsyncIterator[RegistryFollower]:
    """Run a follower in the background for the duration of the block."""
    task = asyncio.create_task(copy.run(), name="registry")
    try:
        yield copy
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
