"""
Read the registry and its changes from the database, for the copy in memory; see docs/decisions/0002-change-feed.md.

Every read is one REPEATABLE READ transaction that takes its locks before its snapshot. A position is the whole
snapshot, so each change row is read once, in whatever order transactions commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import asyncpg
import structlog

from authbackend.errors import Unavailable, Unwritable
from authbackend.postgres import locks
from authbackend.postgres.compatibility import require_fit
from authbackend.postgres.connection import Connection, Target, connect, translated_errors
from authbackend.postgres.listener import Listener
from authbackend.postgres.lock_waits import locked_out
from authbackend.postgres.replicas import Identity, introduce
from authbackend.postgres.statements import load_statements
from authbackend.registry.follower import FeedRead, SuspectRows
from authbackend.registry.position import FeedPosition
from authbackend.registry.records import DeviceRow, Patch
from authbackend.registry.store import Store
from authbackend.registry.writability import Writability

log = structlog.get_logger(__name__)

WATCHED_TABLES = ("device_type", "client_id_move", "device", "device_hold", "account", "topic_rule")
"""Tables that this program reads; a newer schema may watch more."""
TRIGGERS_A_TABLE = 4
CHUNK_ROWS = 2000
CHANNEL = "registry"
PROBE_S = 5.0
LOCK_TIMEOUT = "500ms"
"""Shorter than PostgreSQL's deadlock_timeout (1 s): a read gives way to a migration and never causes its cancellation."""
_MAX_PATCH_SHARE = 0.2  # of the devices; above it a full load is cheaper

_ENTITIES = ("device_type", "device", "account")


class ChangeFeed:
    """
    Reads for one replica; not for concurrent use by several tasks.

    Args:
        change_retention_s: How long :meth:`prune` keeps change rows.
        identity: The replica, registered on each new connection before the first read; None for a reader that is no replica.
        on_ignored: Called with the number of changes to entities that this program does not know.
        writability: Shared with everything else in this process that writes to the database.
    """

    def __init__(
        self,
        target: Target,
        change_retention_s: float = 3600.0,
        identity: Identity | None = None,
        on_ignored: Callable[[int], object] | None = None,
        writability: Writability | None = None,
    ) -> None:
        self._identity = identity
        self._on_ignored = on_ignored
        self._unknown: set[str] = set()
        self._introduced = False
        self._row: uuid.UUID | None = None
        self._vouches_for: uuid.UUID | None = None
        self._writability = writability or Writability()
        self._target = target
        self._retention_s = change_retention_s
        self._connection: Connection | None = None
        self._statements = load_statements("registry")

    async def load(self, store: Store, synced_at: float) -> FeedRead:
        """
        Load the whole registry into a store, whose readers see it only when it is complete.

        Raises:
            Unavailable: The server cannot be reached, is a standby, has no registry, its triggers are missing, its schema
                needs a newer program, or the store has no room.
        """
        # Pause between chunks while workers answer from the current copy: they must not notice a reload. Nothing else
        # may slow the follower down: revocations depend on it.
        rest = 1.0 if store.state() is not None else 0.0
        async with self._read() as (connection, feed_read, _):
            with store.loading(feed_read.position, synced_at, feed_read.confirmed_at.timestamp()) as loader:
                for entity, statement in (("device_type", "all_device_types"), ("account", "all_accounts")):
                    for row in await self._fetch(connection, statement):
                        loader.add(entity, row["name"], row["record"])
                async for chunk in self._chunks(connection, self._statements.all_devices.sql):
                    began = time.monotonic()
                    loader.add_devices(chunk)
                    await asyncio.sleep(rest * (time.monotonic() - began))
            return feed_read

    async def changes(self, position: FeedPosition, devices: int) -> tuple[Patch, FeedRead] | None:
        """
        Return the changes since a position, and the position of this read.

        None if a full load is needed: another incarnation of the database, change rows pruned, counters
        gone back, a table truncated, or so many of the ``devices`` changed that a full load is cheaper.

        Raises:
            Unavailable: As :meth:`load`.
        """
        async with self._read() as (connection, feed_read, floor):
            patch = await self._changes(connection, position, feed_read.position, floor, devices)
            return None if patch is None else (patch, feed_read)

    async def suspects(self, store: Store) -> Patch:
        """
        Compare a store with the database value by value, on a separate connection, and return the rows that differ.

        A row may differ only because the store was updated meanwhile: see :meth:`confirm`.

        Raises:
            Unavailable: As :meth:`load`.
        """
        other = ChangeFeed(self._target)
        try:
            async with other._read() as (connection, _, _):
                return await self._compare(connection, store)
        finally:
            await other.close()

    async def _compare(self, connection: Connection, store: Store) -> Patch:
        types: dict[str, bytes | None] = {}
        devices: dict[str, DeviceRow | None] = {}
        accounts: dict[str, bytes | None] = {}
        copy = store.reader()
        for entity, statement, differ in (
            ("device_type", "all_device_types", types),
            ("account", "all_accounts", accounts),
        ):
            rows = await self._fetch(connection, statement)
            with copy:
                differ.update((r["name"], r["record"]) for r in rows if copy.record(entity, r["name"]) != r["record"])
        async for chunk in self._chunks(connection, self._statements.all_devices.sql):
            with copy:
                for row in chunk:
                    device = DeviceRow(row["name"], row["record"], row["other_id"])
                    if not copy.same(device):
                        devices[(device.other_id or device.name).decode()] = device
            await asyncio.sleep(0)
        return Patch(types, devices, accounts)

    async def confirm(self, position: FeedPosition, devices: int, suspects: Patch) -> SuspectRows | None:
        """
        Read suspect rows again, together with the changes since a position.

        None if a full load is needed anyway.

        Raises:
            Unavailable: As :meth:`load`.
        """
        async with self._read() as (connection, feed_read, floor):
            patch = await self._changes(connection, position, feed_read.position, floor, devices)
            if patch is None:
                return None
            keys = (suspects.device_types, suspects.devices, suspects.accounts)
            current = await self._patch(connection, dict(zip(_ENTITIES, map(list, keys), strict=True)))
            sizes = await connection.fetchrow(self._statements.sizes.sql)
            assert sizes is not None
            return SuspectRows(patch, current, dict(sizes), feed_read)

    async def later_changes(self, position: FeedPosition) -> set[tuple[str, str]] | None:
        """
        Return the keys of the rows changed after a position in an earlier incarnation; None if unknown.

        A promoted standby continues the transaction ids of its primary. In another server or database they are
        unrelated, so no change counts as later.

        Raises:
            Unavailable: As :meth:`load`.
        """
        async with self._read() as (connection, feed_read, floor):
            if position.epoch.split("/")[:2] != feed_read.position.epoch.split("/")[:2]:  # system and database
                return set()
            if position.xmin < floor:
                return None
            rows = await connection.fetch(self._statements.changes_since.sql, str(position.xmax), position.running)
            return {(row["entity"], row["key"]) for row in rows}

    async def prune(self) -> None:
        """Delete change rows older than the retention time."""
        with translated_errors():
            connection = await self._connected()
            await connection.fetchval(self._statements.prune.sql, self._retention_s)

    @contextlib.asynccontextmanager
    async def wake_ups(self) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """
        Listen for changes on a separate connection; notifications that pile up become one wake-up.

        Raises:
            Unavailable: The connection cannot be made or is lost.
        """
        name = f"{self._target.application_name} listener"
        connection = await connect(replace(self._target, application_name=name))
        try:
            listener = Listener(connection)
            await listener.listen(CHANNEL)

            async def next_change() -> None:
                while not await listener.wait(PROBE_S):
                    with translated_errors():  # a lost peer is noticed only when something is sent
                        await connection.fetchval("select 1")

            yield next_change
        finally:
            with contextlib.suppress(Exception):
                await connection.close(timeout=1)

    async def close(self) -> None:
        """Close the connection; the next call opens a new one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                await connection.close(timeout=1)

    async def _connected(self) -> Connection:
        if self._connection is None or self._connection.is_closed():
            self._connection = await connect(self._target)
            self._introduced, self._vouches_for = False, None
        return self._connection

    @contextlib.asynccontextmanager
    async def _read(self) -> AsyncIterator[tuple[Connection, FeedRead, int]]:
        """Open a read transaction; yield the connection, its position, and the floor, below which changes may have been pruned."""
        with translated_errors():
            connection = await self._connected()
            server = await connection.fetchrow(self._statements.server.sql)
            assert server is not None
            require_fit(server["oldest_program"])
            if server["standby"]:
                raise Unavailable(
                    "the server is a standby; its snapshots do not list running transactions, so changes could be missed. Connect to the primary"
                )
            if self._identity is not None:
                await self._register(connection, self._identity)
            for _ in range(2):
                try:
                    async with connection.transaction(isolation="repeatable_read", readonly=True):
                        await connection.execute(f"set local lock_timeout = '{LOCK_TIMEOUT}'")
                        await connection.execute(self._statements.lock_registry.sql)
                        feed_read, floor = self._position(
                            await connection.fetchrow(self._statements.position.sql, WATCHED_TABLES)
                        )
                        if feed_read is not None:
                            yield connection, feed_read, floor
                            return
                except asyncpg.LockNotAvailableError as error:
                    raise Unavailable(await locked_out(connection, LOCK_TIMEOUT)) from error
                # Crash recovery empties the table of the incarnation; a new one makes every reader load everything again.
                await connection.fetchval(self._statements.renew_incarnation.sql)
            raise Unavailable("the incarnation of the database cannot be renewed")

    async def _register(self, connection: Connection, identity: Identity) -> None:
        """Register this replica, so that nothing counts as confirmed by all replicas without it."""
        statements = load_statements("replicas")
        if not self._introduced:
            try:
                with translated_errors():
                    await introduce(connection, identity)
                self._introduced, self._row = True, identity.boot.id
            except Unwritable as error:
                self._writability.failed(error.detail)
                # Until this boot can be registered, the row of an earlier boot of the same replica stands in for it.
                ids = [identity.boot.id, *reversed(identity.boot.former)]
                self._row = await connection.fetchval(statements.known.sql, ids)
                if self._row is None:
                    raise Unavailable(
                        "this replica is not registered in the database and cannot be, so a revocation would not wait "
                        f"for it: {error.detail}"
                    ) from error
        if (self._vouches_for is not None) != (self._writability.fault is not None):
            statement = statements.vouch if self._vouches_for is None else statements.no_vouch
            await connection.fetchval(statement.sql, locks.REPLICA, self._vouches_for or self._row)
            self._vouches_for = None if self._vouches_for else self._row

    def _position(self, row: Any) -> tuple[FeedRead | None, int]:
        require_fit(row["oldest_program"])  # checked again: the schema may have changed before the locks were taken
        expected = len(WATCHED_TABLES) * TRIGGERS_A_TABLE
        if row["triggers"] != expected:
            raise Unavailable(
                f"{row['triggers']} of {expected} change triggers exist and are enabled: a restore is running, or it "
                "left them disabled. Run: authbackend migrate --repair-triggers"
            )
        if row["incarnation"] is None:
            return None, 0
        return FeedRead(FeedPosition(row["epoch"], row["incarnation"], row["snapshot"]), row["at"]), int(row["floor"])

    async def _changes(
        self, connection: Connection, old: FeedPosition, new: FeedPosition, floor: int, devices: int
    ) -> Patch | None:
        if not _follows(old, new, floor):
            return None
        changed: dict[str, list[str]] = {entity: [] for entity in _ENTITIES}
        unknown: Counter[str] = Counter()
        for row in await connection.fetch(self._statements.changes_since.sql, str(old.xmax), old.running):
            if row["entity"] not in changed:
                unknown[row["entity"]] += 1
            elif row["key"] == "*":
                return None
            else:
                changed[row["entity"]].append(row["key"])
        self._ignore(unknown)
        if len(changed["device"]) > max(CHUNK_ROWS, devices * _MAX_PATCH_SHARE):
            return None
        return await self._patch(connection, changed)

    def _ignore(self, unknown: Counter[str]) -> None:
        for entity in unknown.keys() - self._unknown:
            log.warning("registry.entity_unknown", entity=entity, next="its changes are ignored and counted")
        self._unknown |= unknown.keys()
        if unknown and self._on_ignored is not None:
            self._on_ignored(unknown.total())

    async def _patch(self, connection: Connection, changed: dict[str, list[str]]) -> Patch:
        types: dict[str, bytes | None] = dict.fromkeys(changed["device_type"])
        devices: dict[str, DeviceRow | None] = dict.fromkeys(changed["device"])
        accounts: dict[str, bytes | None] = dict.fromkeys(changed["account"])
        for records, statement in ((types, "device_types"), (accounts, "accounts")):
            if records:
                rows = await self._fetch(connection, statement, list(records))
                records.update((row["name"], row["record"]) for row in rows)
        if devices:
            async for chunk in self._chunks(connection, self._statements.devices.sql, changed["device"]):
                for device_id, *row in chunk:
                    devices[device_id] = DeviceRow(*row)
                await asyncio.sleep(0)
        return Patch(types, devices, accounts)

    async def _fetch(self, connection: Connection, statement: str, *arguments: Any) -> list[Any]:
        return await connection.fetch(getattr(self._statements, statement).sql, *arguments)

    @staticmethod
    async def _chunks(connection: Connection, statement: str, *arguments: Any) -> AsyncIterator[list[Any]]:
        cursor = await connection.cursor(statement, *arguments)
        while chunk := await cursor.fetch(CHUNK_ROWS):
            yield chunk


def _follows(old: FeedPosition, new: FeedPosition, floor: int) -> bool:
    """Return whether the change feed leads from one position to another."""
    return old.same_life(new) and old.xmin >= floor and new.xmin >= old.xmin and new.xmax >= old.xmax
