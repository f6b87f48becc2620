"""Follows the registry of a test database with the real reader, and compares the copy with the database."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from authbackend.postgres.connection import Target
from authbackend.postgres.feed import ChangeFeed
from authbackend.registry.snapshot import Mark, Patch, Snapshot
from authbackend.registry.sync import Refreshed, RegistryCopy, SyncTimes
from tests.support.postgres import connected


@dataclass
class Observed:
    """What a copy told its observer."""

    refreshes: list[Refreshed] = field(default_factory=list)
    failures: int = 0
    comparisons: list[int] = field(default_factory=list)

    def refreshed(self, snapshot: Snapshot, refreshed: Refreshed) -> None:
        self.refreshes.append(refreshed)

    def refresh_failed(self) -> None:
        self.failures += 1

    def compared(self, differences: int) -> None:
        self.comparisons.append(differences)


class CheckedFeed(ChangeFeed):
    """The real reader; every look also reads the whole registry in the same snapshot of the database."""

    truth: Snapshot | None = None

    async def _changes(self, connection: Any, snapshot: Snapshot, mark: Mark, floor: int) -> Patch | None:
        patch = await super()._changes(connection, snapshot, mark, floor)
        self.truth = await self._load(connection, mark)
        return patch


class Following:
    """
    A copy with its reader and observer, refreshed by hand or in the background.

    Args:
        dsn: The database.
        feed: The reader; default: the real one.
    """

    def __init__(self, dsn: str, feed: ChangeFeed | None = None, times: SyncTimes | None = None) -> None:
        self.dsn = dsn
        self.feed = feed or ChangeFeed(Target(dsn))
        self.observed = Observed()
        self.copy = RegistryCopy(self.feed, self.observed, times)

    @property
    def snapshot(self) -> Snapshot:
        assert self.copy.snapshot is not None
        return self.copy.snapshot

    @property
    def mark(self) -> Mark:
        assert self.snapshot.mark is not None
        return self.snapshot.mark

    def devices(self) -> dict[str, tuple[str, str, str]]:
        """Return common name, type and status of each device, by its id, and check that both indexes agree."""
        found = {}
        for name, device in self.snapshot._by_name.items():
            assert device.common_name == name
            assert self.snapshot.device_by_id(device.device_id) is device
            found[str(device.device_id)] = (device.common_name, device.type, str(device.status))
        assert set(self.snapshot._by_id) == {key for key, (name, *_) in found.items() if key != name}
        return found

    async def agrees(self) -> bool:
        """Return whether the copy is what the database holds now."""
        async with connected(self.dsn) as connection:
            devices = {
                row[0]: tuple(row[1:])
                for row in await connection.fetch("select device_id, common_name, type, status from device")
            }
        fresh = ChangeFeed(Target(self.dsn))
        try:
            return self.devices() == devices and contents(self.snapshot) == contents(await fresh.load())
        finally:
            await fresh.close()


def contents(snapshot: Snapshot) -> tuple[dict[str, Any], ...]:
    """Return everything a snapshot holds, comparable."""
    return (snapshot._by_name, snapshot._by_id, snapshot._device_types, snapshot._accounts)


@contextlib.asynccontextmanager
async def copied(dsn: str, feed: ChangeFeed | None = None, times: SyncTimes | None = None) -> AsyncIterator[Following]:
    """Load a copy, and drop its connection at the end."""
    following = Following(dsn, feed, times)
    try:
        await following.copy.refresh()
        yield following
    finally:
        await following.feed.close()


class DeafFeed(ChangeFeed):
    """The real reader, but no notification ever reaches it."""

    @contextlib.asynccontextmanager
    async def wake_ups(self) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        async with super().wake_ups():
            yield asyncio.Event().wait  # type: ignore[misc]


async def fleet(connection: asyncpg.Connection, number: int = 3) -> None:
    """Commit a device type, an account, two rules and some devices d1, d2, ..."""
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
async def following(copy: RegistryCopy) -> AsyncIterator[RegistryCopy]:
    """Run a copy in the background for the time of the block."""
    task = asyncio.create_task(copy.run(), name="registry")
    try:
        yield copy
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
