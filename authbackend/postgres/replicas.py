"""Record which registry version each replica serves, and wait until all replicas serve a version."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg
import structlog

from authbackend import clocks
from authbackend.errors import InvalidInput, NotFound, Unconfirmed
from authbackend.postgres.connection import Connection, Target, connect, connected, name_actor, translated_errors
from authbackend.postgres.statements import load_statements
from authbackend.registry.announcer import Peers
from authbackend.registry.identity import Boot
from authbackend.registry.position import FeedPosition

log = structlog.get_logger(__name__)

_POLL_EVERY_S = 0.02
_STEP_S = 2.0
"""Smaller clock steps and drift are harmless: waiting for a replica ends 5 s after its copy is too old to answer from."""

_VERSION = re.compile(r"([1-9][0-9]{0,18})(?:@([0-9a-f]{8}))?")


@dataclass(frozen=True, slots=True)
class Identity:
    """
    The identity of a replica, as its row in the database has it.

    Args:
        boot: This start of the service, and the earlier ones that it replaces.
        name: Name for people.
        longest_staleness_s: How long it answers from its copy without the database.
    """

    boot: Boot
    name: str
    program_version: str
    workers: int
    longest_staleness_s: float

    def values(self) -> tuple[Any, ...]:
        """Return the parameters that all statements of a replica begin with."""
        return (self.boot.id, self.boot.folder, self.name, self.program_version, self.workers, self.longest_staleness_s)


async def introduce(connection: Connection, identity: Identity) -> None:
    """Register a replica; commit this before its first read, so that later changes are confirmed only with it."""
    values = (*identity.values(), identity.boot.former, identity.boot.former_ended)
    await connection.execute(load_statements("replicas").introduce.sql, *values)


class PostgresReplicaTable:
    """Access to one replica's row, on a connection of its own; implements ``registry.announcer.ReplicaTable``."""

    def __init__(self, target: Target, identity: Identity) -> None:
        self._target = target
        self._identity = identity
        self._connection: Connection | None = None
        self._clock: tuple[float, float] | None = None  # the database's, and this machine's uptime when it was read
        self._statements = load_statements("replicas")

    async def announce(self, position: FeedPosition, confirmed_at: datetime) -> None:
        """
        Record the version that this replica serves.

        Raises:
            AuthbackendError: The database cannot be reached or refuses.
        """
        values = (*self._identity.values(), position.epoch, position.incarnation, position.snapshot, confirmed_at)
        await self._execute(self._statements.announce.sql, *values)

    async def sign_off(self, *, comes_back: bool) -> None:
        """
        Record that this replica stops.

        Args:
            comes_back: Whether it can restart without the database, from a copy on disk.
        Raises:
            AuthbackendError: The database cannot be reached or refuses.
        """
        await self._execute(self._statements.sign_off.sql, self._identity.boot.id, comes_back)

    async def peers(self) -> Peers:
        """
        Return the state of all replicas, and delete those that have been unable to answer for a day.

        Raises:
            AuthbackendError: The database cannot be reached or refuses.
        """
        await self._compensate_clock_step()  # first, because pruning goes by the database's clock
        await self._execute(self._statements.prune.sql)
        with translated_errors():
            rows = await (await self._connected()).fetch(self._statements.replicas.sql)
        states = dict.fromkeys(("live", "silent", "stopped"), 0)
        for row in rows:
            state = {"starting": "live", "gone": "stopped"}.get(row["state"], row["state"])
            states[state] += 1
        ages: dict[str, float] = {}
        for row in rows:
            if row["may_answer"] and row["age_s"] is not None:
                ages[row["name"]] = max(row["age_s"], ages.get(row["name"], 0.0))
        return Peers(states, ages, sum(row["twins"] > 0 for row in rows))

    async def close(self) -> None:
        """Close the connection; the next call opens a new one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                await connection.close(timeout=1)
            except (asyncpg.PostgresError, OSError, TimeoutError):
                connection.terminate()

    async def _compensate_clock_step(self) -> None:
        """
        If the database's clock was set forward, move the times on record forward too, so that no replica counts as gone.

        A replica that is cut off measures the age of its copy by its own clock, so it may still answer for as long as before.
        """
        read_at = clocks.uptime()
        with translated_errors():
            now = float(await (await self._connected()).fetchval(self._statements.now.sql))
        if self._clock is not None:
            previous, previous_read_at = self._clock
            step_s = now - previous - (clocks.uptime() - previous_read_at)  # or more: query times count as elapsed
            if step_s > _STEP_S:
                await self._execute(self._statements.allow_for_a_step.sql, step_s)
                log.error(
                    "database.clock_stepped",
                    by_s=round(step_s, 1),
                    next="replicas that are cut off are still waited for as long as before; let NTP slew the clock instead of stepping it",
                )
        self._clock = now, read_at

    async def _execute(self, statement: str, *values: Any) -> None:
        with translated_errors():
            await (await self._connected()).execute(statement, *values)

    async def _connected(self) -> Connection:
        if self._connection is None or self._connection.is_closed():
            self._connection = await connect(self._target)
            # What a server crash loses is written again within a second.
            await self._connection.execute("set synchronous_commit = off")
        return self._connection


async def list_replicas(target: Target) -> list[dict[str, Any]]:
    """
    Return all replicas, ordered by name.

    Raises:
        AuthbackendError: The database cannot be reached or refuses.
    """
    async with connected(target) as connection:
        return [dict(row) for row in await connection.fetch(load_statements("replicas").replicas.sql)]


async def forget_replica(target: Target, actor: str, name: str) -> int:
    """
    Delete replicas by id or name, and return how many; one that still runs registers again within a second.

    Raises:
        NotFound: There is no such replica.
    """
    async with connected(target) as connection, connection.transaction():
        await name_actor(connection, actor)
        number = int(await connection.fetchval(load_statements("replicas").forget.sql, name))
    if not number:
        raise NotFound(f"no replica has the id or name {name!r}")
    return number


async def wait(target: Target, version: str, timeout_s: float) -> list[dict[str, Any]]:
    """
    Wait until every replica that may answer serves a registry version, and return these replicas.

    Args:
        version: ``TRANSACTION@INCARNATION`` as commands print it and ``select registry_version()`` returns it; without
            ``@INCARNATION``, the current one of the database is assumed.
    Raises:
        InvalidInput: It is not a registry version, or its transaction was rolled back or has not begun.
        Unconfirmed: Not all replicas serve it in time (the message names them), or that cannot be determined.
        Unavailable: The database cannot be reached.
    """
    match = _VERSION.fullmatch(version)
    if match is None or int(match[1]) >= 2**63:
        raise InvalidInput(f"{version!r} is not a registry version; one looks like 5123@0a1b2c3d")
    deadline = time.monotonic() + timeout_s
    statements = load_statements("replicas")
    async with connected(target) as connection:
        while True:
            status = await _status(connection, match[1], match[2])
            replicas = [dict(row) for row in await connection.fetch(statements.awaited.sql, match[1])]
            missing = [replica for replica in replicas if not replica["serves"]]
            if status == "committed" and not missing:
                return replicas
            if time.monotonic() >= deadline:
                raise Unconfirmed(_unconfirmed(version, status, missing, timeout_s))
            await asyncio.sleep(_POLL_EVERY_S)


async def _status(connection: Connection, transaction: str, incarnation: str | None) -> str:
    try:
        row = await connection.fetchrow(load_statements("replicas").version_status.sql, transaction)
    except asyncpg.InvalidParameterValueError:
        raise InvalidInput(f"no transaction {transaction} has begun yet") from None
    assert row is not None
    if incarnation is not None and row["life"] != incarnation:
        raise Unconfirmed(
            f"the version {transaction}@{incarnation} is of another incarnation of the database, which has been restarted, "
            "restored or replaced since: it is unknown whether the replicas serve it. See: authbackend replicas"
        )
    if row["status"] == "aborted":
        raise InvalidInput(f"transaction {transaction} was rolled back; there is nothing to wait for")
    if row["status"] is None:
        raise Unconfirmed(
            f"transaction {transaction} is so old that the server no longer knows whether it was committed"
        )
    return str(row["status"])


def _unconfirmed(version: str, status: str, missing: list[dict[str, Any]], timeout_s: float) -> str:
    if status != "committed":
        return f"version {version} was not committed within {timeout_s:g} s"
    listed = "; ".join(
        f"{replica['name']} ({replica['id']}) is {replica['state']} and may answer from its copy until "
        f"{replica['counts_until']:%Y-%m-%d %H:%M:%S} UTC"
        for replica in missing
    )
    return f"version {version} is not confirmed by all replicas after {timeout_s:g} s: {listed}"
