"""
Reads the registry and follows the change feed, as docs/decisions/0002-change-feed.md tells.

Every look is one REPEATABLE READ transaction that takes its locks before its snapshot. The mark is the whole
snapshot, so each change row is read once, whatever the order of commits.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import structlog

from authbackend.errors import Unavailable
from authbackend.policy.rules import Account, Device, DeviceType
from authbackend.postgres import rows
from authbackend.postgres.connection import Connection, Target, connect, translated_errors
from authbackend.postgres.statements import load_statements
from authbackend.registry.snapshot import Mark, Patch, Snapshot

log = structlog.get_logger(__name__)

WATCHED_TABLES = 4
TRIGGERS_A_TABLE = 4
CHUNK_ROWS = 2000
CHANNEL = "registry"
_PATCH_AT_MOST_SHARE = 0.2  # above it a full load is cheaper

_ENTITIES = ("device_type", "device", "account")


class ChangeFeed:
    """
    One replica's reader; not for several tasks at once.

    Args:
        change_retention_s: How long change rows are kept by :meth:`prune`.
    """

    def __init__(self, target: Target, change_retention_s: float = 3600.0) -> None:
        self._target = target
        self._retention_s = change_retention_s
        self._connection: Connection | None = None
        self._statements = load_statements("registry")

    async def load(self) -> Snapshot:
        """
        Return a whole copy.

        Raises:
            Unavailable: The server cannot be reached, is a standby, has no registry, or its triggers are missing.
        """
        async with self._look() as (connection, mark, _):
            return await self._load(connection, mark)

    async def changes(self, snapshot: Snapshot) -> tuple[Patch, Snapshot] | None:
        """
        Return what changed since a snapshot, with a bare snapshot that holds the new mark.

        None when the copy must be loaded anew: another life of the server, change rows pruned or counters gone
        back, a table emptied, or so many changes that a load is cheaper.

        Raises:
            Unavailable: As :meth:`load`.
        """
        async with self._look() as (connection, mark, floor):
            patch = await self._changes(connection, snapshot, mark, floor)
            return None if patch is None else (patch, Snapshot(mark))

    async def suspects(self, snapshot: Snapshot) -> Patch:
        """
        Compare a copy with the database value by value, on a connection of its own, and return the rows that differ.

        The copy may move on meanwhile, so that a row may differ for that reason: see :meth:`confirm`.

        Raises:
            Unavailable: As :meth:`load`.
        """
        other = ChangeFeed(self._target)
        try:
            async with other._look() as (connection, _, _):
                return await self._compare(connection, snapshot)
        finally:
            await other.close()

    async def _compare(self, connection: Connection, snapshot: Snapshot) -> Patch:
        rules = await self._rules(connection)
        types = {row["name"]: rows.device_type(row, rules) for row in await self._all(connection, "device_types")}
        accounts = {row["name"]: rows.account(row, rules) for row in await self._all(connection, "accounts")}
        devices: dict[str, Device | None] = {}
        async for chunk in self._chunks(connection, self._statements.all_devices.sql):
            for row in chunk:
                device = rows.device(row, rules)
                if snapshot.device_by_id(device.device_id) != device:
                    devices[device.device_id] = device
            await asyncio.sleep(0)
        return Patch(
            {name: found for name, found in types.items() if snapshot.device_type(name) != found},
            devices,
            {name: found for name, found in accounts.items() if snapshot.account(name) != found},
        )

    async def confirm(self, snapshot: Snapshot, suspects: Patch) -> int | None:
        """
        Bring a copy up to date and return how many of these rows still differ, or are too many or too few in it.

        None if the copy must be loaded anew anyway.

        Raises:
            Unavailable: As :meth:`load`.
        """
        async with self._look() as (connection, mark, floor):
            patch = await self._changes(connection, snapshot, mark, floor)
            if patch is None:
                return None
            snapshot.apply(patch, mark)
            present = await self._patch(
                connection,
                {
                    "device_type": list(suspects.device_types),
                    "device": list(suspects.devices),
                    "account": list(suspects.accounts),
                },
            )
            differ = sum(snapshot.device_by_id(key) != device for key, device in present.devices.items())
            differ += sum(snapshot.device_type(key) != kind for key, kind in present.device_types.items())
            differ += sum(snapshot.account(key) != account for key, account in present.accounts.items())
            counted = await connection.fetchrow(self._statements.sizes.sql)
            assert counted is not None
            return differ or sum(abs(size - counted[entity]) for entity, size in snapshot.sizes().items())

    async def prune(self) -> None:
        """Delete change rows that every reader of the retention time has seen."""
        with translated_errors():
            connection = await self._connected()
            await connection.fetchval(self._statements.prune.sql, self._retention_s)

    @contextlib.asynccontextmanager
    async def wake_ups(self) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """
        Listen on a connection of its own; repeated notifications are one wake-up.

        Raises:
            Unavailable: The connection cannot be made or is lost.
        """
        woken = asyncio.Event()
        lost = False

        def on_lost(_: Any) -> None:
            nonlocal lost
            lost = True
            woken.set()

        async def next_change() -> None:
            await woken.wait()
            if lost:
                raise Unavailable("the listening connection was lost")
            woken.clear()

        connection = await connect(self._target)
        try:
            connection.add_termination_listener(on_lost)
            with translated_errors():
                await connection.add_listener(CHANNEL, lambda *_: woken.set())
            yield next_change
        finally:
            with contextlib.suppress(Exception):
                await connection.close(timeout=1)

    async def close(self) -> None:
        """Drop the connection; the next call opens one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                await connection.close(timeout=1)

    async def _connected(self) -> Connection:
        if self._connection is None or self._connection.is_closed():
            self._connection = await connect(self._target)
        return self._connection

    @contextlib.asynccontextmanager
    async def _look(self) -> AsyncIterator[tuple[Connection, Mark, int]]:
        """Open the reading transaction; yields the connection, the mark to come, and the floor of the feed."""
        with translated_errors():
            connection = await self._connected()
            if await connection.fetchval("select pg_is_in_recovery()"):
                raise Unavailable(
                    "the server is a standby; its snapshots do not show running transactions, so changes could be missed. Connect to the primary"
                )
            for _ in range(2):
                async with connection.transaction(isolation="repeatable_read", readonly=True):
                    await connection.execute("set local lock_timeout = '2s'")
                    await connection.execute(self._statements.lock_registry.sql)
                    mark, floor = self._position(await connection.fetchrow(self._statements.position.sql))
                    if mark is not None:
                        yield connection, mark, floor
                        return
                # Empty after a crash recovery: a new one tells every reader to load anew.
                await connection.fetchval(self._statements.renew_incarnation.sql)
            raise Unavailable("the incarnation of the server cannot be renewed")

    def _position(self, row: Any) -> tuple[Mark | None, int]:
        expected = WATCHED_TABLES * TRIGGERS_A_TABLE
        if row["triggers"] != expected:
            raise Unavailable(
                f"{row['triggers']} of {expected} change triggers are there and enabled: a restore is running, or it "
                "left them disabled. Run: authbackend migrate --repair-triggers"
            )
        if row["incarnation"] is None:
            return None, 0
        return Mark(row["epoch"], row["incarnation"], row["snapshot"]), int(row["floor"])

    async def _load(self, connection: Connection, mark: Mark) -> Snapshot:
        snapshot = Snapshot(mark)
        rules = await self._rules(connection)
        types = await self._all(connection, "device_types")
        accounts = await self._all(connection, "accounts")
        snapshot.apply(
            Patch(
                device_types={row["name"]: rows.device_type(row, rules) for row in types},
                accounts={row["name"]: rows.account(row, rules) for row in accounts},
            ),
            mark,
        )
        async for chunk in self._chunks(connection, self._statements.all_devices.sql):
            snapshot.add_devices([rows.device(row, rules) for row in chunk])
            await asyncio.sleep(0)
        return snapshot

    async def _changes(self, connection: Connection, snapshot: Snapshot, mark: Mark, floor: int) -> Patch | None:
        old = snapshot.mark
        if old is None or not _follows(old, mark, floor):
            return None
        changed: dict[str, list[str]] = {entity: [] for entity in _ENTITIES}
        for row in await connection.fetch(self._statements.changes_since.sql, str(old.xmax), old.running):
            if row["key"] == "*":
                return None
            changed[row["entity"]].append(row["key"])
        total = snapshot.sizes()["device"]
        if len(changed["device"]) > max(CHUNK_ROWS, total * _PATCH_AT_MOST_SHARE):
            return None
        return await self._patch(connection, changed)

    async def _patch(self, connection: Connection, changed: dict[str, list[str]]) -> Patch:
        if not any(changed.values()):
            return Patch()
        types: dict[str, DeviceType | None] = dict.fromkeys(changed["device_type"])
        devices: dict[str, Device | None] = dict.fromkeys(changed["device"])
        accounts: dict[str, Account | None] = dict.fromkeys(changed["account"])
        rules = rows.RulesByOwner(
            await connection.fetch(
                self._statements.rules_of.sql, changed["device_type"], changed["device"], changed["account"]
            )
        )
        if types:
            for row in await connection.fetch(self._statements.device_types.sql, changed["device_type"]):
                types[row["name"]] = rows.device_type(row, rules)
        if accounts:
            for row in await connection.fetch(self._statements.accounts.sql, changed["account"]):
                accounts[row["name"]] = rows.account(row, rules)
        if devices:
            async for chunk in self._chunks(connection, self._statements.devices.sql, changed["device"]):
                devices.update((row["device_id"], rows.device(row, rules)) for row in chunk)
                await asyncio.sleep(0)
        return Patch(types, devices, accounts)

    async def _rules(self, connection: Connection) -> rows.RulesByOwner:
        rules = rows.RulesByOwner()
        async for chunk in self._chunks(connection, self._statements.all_rules.sql):
            rules.add(chunk)
            await asyncio.sleep(0)
        return rules

    async def _all(self, connection: Connection, name: str) -> list[Any]:
        return await connection.fetch(getattr(self._statements, f"all_{name}").sql)

    @staticmethod
    async def _chunks(connection: Connection, statement: str, *arguments: Any) -> AsyncIterator[list[Any]]:
        cursor = await connection.cursor(statement, *arguments)
        while chunk := await cursor.fetch(CHUNK_ROWS):
            yield chunk


def _follows(old: Mark, new: Mark, floor: int) -> bool:
    """Return whether the change feed can lead from one mark to another."""
    return (
        (old.epoch, old.incarnation) == (new.epoch, new.incarnation)
        and old.xmin >= floor
        and new.xmin >= old.xmin
        and new.xmax >= old.xmax
    )
