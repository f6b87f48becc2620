"""The replicas in the database: each says which version it serves, and whoever committed a change can wait for all."""

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

_LOOK_EVERY_S = 0.02
_STEP_S = 2.0
"""What is waited for has 5 s to spare; smaller steps, and what clocks drift, do no harm."""

_VERSION = re.compile(r"([1-9][0-9]{0,18})(?:@([0-9a-f]{8}))?")


@dataclass(frozen=True, slots=True)
class Identity:
    """
    Who a replica is.

    Args:
        boot: This start of it, and which others it takes the place of.
        name: For people.
        longest_staleness_s: How long it goes on answering without the database.
    """

    boot: Boot
    name: str
    program_version: str
    workers: int
    longest_staleness_s: float

    def values(self) -> tuple[Any, ...]:
        """Return the first parameters of the statements."""
        return (self.boot.id, self.boot.folder, self.name, self.program_version, self.workers, self.longest_staleness_s)


async def introduce(connection: Connection, identity: Identity) -> None:
    """Make a replica known; commit it before its first look, so that no later change misses it."""
    values = (*identity.values(), identity.boot.former, identity.boot.former_ended)
    await connection.execute(load_statements("replicas").introduce.sql, *values)


class PostgresReplicaTable:
    """Writes one replica's row, on a connection of its own; implements ``registry.presence.Announcer``."""

    def __init__(self, target: Target, identity: Identity) -> None:
        self._target = target
        self._identity = identity
        self._connection: Connection | None = None
        self._clock: tuple[float, float] | None = None  # the database's, and this machine's when it was asked for
        self._statements = load_statements("replicas")

    async def announce(self, position: FeedPosition, confirmed_at: datetime) -> None:
        """
        Say which version this replica serves.

        Raises:
            AuthbackendError: The database cannot be reached or refuses.
        """
        values = (*self._identity.values(), position.epoch, position.incarnation, position.snapshot, confirmed_at)
        await self._execute(self._statements.announce.sql, *values)

    async def sign_off(self, *, comes_back: bool) -> None:
        """
        Say that this replica stops.

        Raises:
            AuthbackendError: The database cannot be reached or refuses.
        """
        await self._execute(self._statements.sign_off.sql, self._identity.boot.id, comes_back)

    async def peers(self) -> Peers:
        """
        Return what the database knows of all replicas, and forget those that cannot answer any more since a day.

        Raises:
            AuthbackendError: The database cannot be reached or refuses.
        """
        await self._allow_for_a_step()  # first: what is pruned is told by the database's clock
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
        """Drop the connection; the next call opens one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                await connection.close(timeout=1)
            except (asyncpg.PostgresError, OSError, TimeoutError):
                connection.terminate()

    async def _allow_for_a_step(self) -> None:
        """
        Notice that the database's clock was set forward, and let nobody pass for gone by it.

        A replica that is cut off tells by its own clock how old its copy is, and may answer for as long as before.
        """
        asked = clocks.uptime()
        with translated_errors():
            now = float(await (await self._connected()).fetchval(self._statements.now.sql))
        if self._clock is not None:
            then, then_asked = self._clock
            step_s = now - then - (clocks.uptime() - then_asked)  # or more: by how long the answers took
            if step_s > _STEP_S:
                await self._execute(self._statements.allow_for_a_step.sql, step_s)
                log.error(
                    "database.clock_stepped",
                    by_s=round(step_s, 1),
                    next="replicas that are cut off are waited for as long as before; let NTP slew the clock, not step it",
                )
        self._clock = now, asked

    async def _execute(self, statement: str, *values: Any) -> None:
        with translated_errors():
            await (await self._connected()).execute(statement, *values)

    async def _connected(self) -> Connection:
        if self._connection is None or self._connection.is_closed():
            self._connection = await connect(self._target)
            # What a crash of the server loses of it is said again within a second.
            await self._connection.execute("set synchronous_commit = off")
        return self._connection


async def list_replicas(target: Target) -> list[dict[str, Any]]:
    """
    Return the replicas by name.

    Raises:
        AuthbackendError: The database cannot be reached or refuses.
    """
    async with connected(target) as connection:
        return [dict(row) for row in await connection.fetch(load_statements("replicas").replicas.sql)]


async def forget_replica(target: Target, actor: str, name: str) -> int:
    """
    Forget replicas by id or name, and return how many; one that still runs comes back by itself within a second.

    Raises:
        NotFound: There is none.
    """
    async with connected(target) as connection, connection.transaction():
        await name_actor(connection, actor)
        number = int(await connection.fetchval(load_statements("replicas").forget.sql, name))
    if not number:
        raise NotFound(f"no replica has the id or name {name!r}")
    return number


async def wait(target: Target, version: str, timeout_s: float) -> list[dict[str, Any]]:
    """
    Wait until every replica that may answer decides by a version, and return the replicas.

    Args:
        version: ``TRANSACTION@LIFE`` as the commands print it and ``select registry_version()`` returns it; without
            ``@LIFE`` the server's present life is meant.
    Raises:
        InvalidInput: It is no version, or its transaction was rolled back or has not begun.
        Unconfirmed: Not all serve it, or it cannot be told; the message names them.
        Unavailable: The database cannot be reached.
    """
    found = _VERSION.fullmatch(version)
    if found is None or int(found[1]) >= 2**63:
        raise InvalidInput(f"{version!r} is no version; it looks like 5123@0a1b2c3d")
    deadline = time.monotonic() + timeout_s
    statements = load_statements("replicas")
    async with connected(target) as connection:
        while True:
            status = await _status(connection, found[1], found[2])
            replicas = [dict(row) for row in await connection.fetch(statements.awaited.sql, found[1])]
            missing = [replica for replica in replicas if not replica["serves"]]
            if status == "committed" and not missing:
                return replicas
            if time.monotonic() >= deadline:
                raise Unconfirmed(_unconfirmed(version, status, missing, timeout_s))
            await asyncio.sleep(_LOOK_EVERY_S)


async def _status(connection: Connection, transaction: str, life: str | None) -> str:
    try:
        row = await connection.fetchrow(load_statements("replicas").version_status.sql, transaction)
    except asyncpg.InvalidParameterValueError:
        raise InvalidInput(f"no transaction {transaction} has begun yet") from None
    assert row is not None
    if life is not None and row["life"] != life:
        raise Unconfirmed(
            f"the version {transaction}@{life} is of another life of the database, which has been restarted, restored or "
            "replaced since: whether its replicas decide by it cannot be told. See: authbackend replicas"
        )
    if row["status"] == "aborted":
        raise InvalidInput(f"transaction {transaction} was rolled back; there is nothing to wait for")
    if row["status"] is None:
        raise Unconfirmed(f"transaction {transaction} is so old that the server does not know what became of it")
    return str(row["status"])


def _unconfirmed(version: str, status: str, missing: list[dict[str, Any]], timeout_s: float) -> str:
    if status != "committed":
        return f"version {version} was not committed within {timeout_s:g} s"
    named = "; ".join(
        f"{replica['name']} ({replica['id']}) is {replica['state']} and may answer from its copy until "
        f"{replica['counts_until']:%Y-%m-%d %H:%M:%S} UTC"
        for replica in missing
    )
    return f"version {version} is not confirmed by all after {timeout_s:g} s: {named}"
