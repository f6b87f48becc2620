"""
Who waits for a session that writes, and for whom it waits itself, seen from a second connection.

A long transaction that holds rows is ended as soon as somebody wants one of them. PostgreSQL lets every role read
``pg_locks`` and see pid, role and application of each session; since when another role's transaction is open only
members of ``pg_read_all_stats`` see.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import asyncpg

from authbackend.errors import Unavailable
from authbackend.postgres.connection import Connection, Target, connected
from authbackend.postgres.statements import load_statements

LOOK_EVERY_S = 0.025
LOCK_TIMEOUT_S = 5.0

_SESSION = """
    left join lateral (select usesysid::regrole::text as role, application_name as application, xact_start as since, state
                       from pg_stat_get_activity(s.pid)) as a on true"""

# Who waits for an advisory lock waits for nobody's rows; who waits for a virtual transaction (CREATE INDEX CONCURRENTLY)
# waits for every old transaction there is, and blocks nobody meanwhile.
_LOOK = f"""
    with waiting as materialized (
      select pid, locktype, relation from pg_locks
      where not granted and (pid = $1 or locktype not in ('advisory', 'virtualxid')))
    select s.*, a.*
    from (select 'waiter' as part, pid, null as held from waiting where pid <> $1 and $1 = any (pg_blocking_pids(pid))
          union all
          select 'holder', b, coalesce(w.relation::regclass::text,
                   (select format('%s (%s,%s)', relation::regclass, page, tuple) from pg_locks
                    where pid = $1 and locktype = 'tuple' and granted limit 1))
          from waiting w cross join lateral unnest(pg_blocking_pids(w.pid)) as b where w.pid = $1) as s {_SESSION}"""

_ADVISORY = f"""
    select s.pid, null as held, a.*
    from (select pid from pg_locks where locktype = 'advisory' and granted and objsubid = 1 and classid = 0 and objid = $1
            and database = (select oid from pg_database where datname = current_database())) as s {_SESSION}"""

_END = "Wait until it ends; who may, ends it with: select pg_terminate_backend({})"

_KEYS = {
    "device_type": "name",
    "device": "device_id",
    "account": "name",
    "topic_rule": "id",
    "device_hold": "device_id",
}


@dataclass(frozen=True, slots=True)
class Session:
    """Another session, as far as this role may see it."""

    pid: int
    role: str | None
    application: str | None
    since: str | None
    state: str | None

    def __str__(self) -> str:
        if not self.pid:
            return "a prepared transaction (see pg_prepared_xacts)"
        since = (
            f"its transaction began at {self.since} and is {self.state}"
            if self.since
            else "since when, this role may not see"
        )
        return f"pid {self.pid} (application {json.dumps(self.application)}, role {self.role}; {since})"


async def locked_out(connection: Connection, waited: str) -> str:
    """
    Return who keeps the registry's tables from being read, for a session that has just given up waiting.

    Args:
        waited: For how long, for people.
    """
    statements = load_statements("registry")
    rows = await connection.fetch(statements.locked_by.sql)
    told = f"the registry cannot be read: its tables were locked for {waited}"
    if not rows:
        return f"{told}, and are free again"
    first = rows[0]
    holders = "; ".join(dict.fromkeys(str(_session(row)) for row in rows if row["exclusive"] == first["exclusive"]))
    if first["pid"] == first["exclusive"]:
        return f"{told}. {holders} has table {first['held']} for itself alone. {_END.format(first['pid'])}"
    activity = await connection.fetchrow(statements.application.sql, first["exclusive"])
    since = first["waits_since"]
    began = f" since {since.isoformat(sep=' ', timespec='seconds')}" if since else ""
    named = f"pid {first['exclusive']} (application {json.dumps(activity and activity['application'])})"
    return (
        f"{told}. {named} waits{began} to have table {first['held']} for itself alone, everybody else waits behind it, and "
        f"it waits for {holders}, whose transaction is older than that. {_END.format(first['exclusive'])}"
    )


class GaveWay(Exception):
    """What was being written was rolled back, because this session waited for it."""

    def __init__(self, waiter: str) -> None:
        super().__init__(waiter)
        self.waiter = waiter


def _session(row: Any) -> Session:
    since = row["since"].isoformat(sep=" ", timespec="seconds") if row["since"] else None
    return Session(row["pid"], row["role"], row["application"], since, row["state"])


class Watch:
    """Made by :func:`watching`."""

    def __init__(self, eyes: Connection, pid: int) -> None:
        self._eyes = eyes
        self._pid = pid
        self._ended = asyncio.Event()
        self._waiter: Session | None = None
        self._holder: tuple[Session, str | None] | None = None
        self._fault: Exception | None = None

    def check(self) -> None:
        """
        To be called before each statement: a session that is between two statements cannot be cancelled.

        Raises:
            GaveWay: Somebody waits.
        """
        if self._waiter is not None:
            raise GaveWay(str(self._waiter))

    @asynccontextmanager
    async def over(self, *, gives_way: bool) -> AsyncIterator[None]:
        """
        Look on until the end of the block.

        Args:
            gives_way: End the statement that runs when somebody waits for this session.
        Raises:
            GaveWay: Somebody waited, or PostgreSQL ended a deadlock; the transaction must be rolled back.
            Unavailable: What the session needs was not free in time, and who holds it; or nobody can look any more.
        """
        self._ended.clear()
        self._waiter = self._holder = self._fault = None
        writer = asyncio.current_task()
        assert writer is not None
        looking = asyncio.create_task(self._look_on(writer, gives_way))
        try:
            yield
        except asyncio.CancelledError:
            if self._fault is None or writer.uncancel():
                raise
            raise Unavailable(
                f"nothing was changed: the connection that looks who waits was lost ({self._fault}); try again"
            ) from self._fault
        except asyncpg.QueryCanceledError:
            self.check()
            raise
        except asyncpg.DeadlockDetectedError as error:
            raise GaveWay(f"a deadlock with {self._holder[0] if self._holder else 'another session'}") from error
        except asyncpg.LockNotAvailableError as error:
            if self._holder is None:
                raise
            await self._end(looking)
            raise Unavailable(await self._who_holds(*self._holder)) from error
        finally:
            await self._end(looking)

    async def _end(self, looking: asyncio.Task[None]) -> None:
        self._ended.set()
        await looking

    async def _look_on(self, writer: asyncio.Task[Any], gives_way: bool) -> None:
        try:
            while not self._ended.is_set():
                await self._look(gives_way)
                try:
                    async with asyncio.timeout(LOOK_EVERY_S):
                        await self._ended.wait()
                except TimeoutError:
                    continue
        except Exception as error:
            self._fault = error
            if not self._ended.is_set():
                writer.cancel()

    async def _look(self, gives_way: bool) -> None:
        waiter = None
        for row in await self._eyes.fetch(_LOOK, self._pid):
            if row["part"] == "holder":
                self._holder = (_session(row), row["held"])
            else:
                waiter = _session(row)
        if waiter is not None and gives_way:
            self._waiter = waiter
            # Again at each look, because what comes between two statements is lost.
            await self._eyes.execute("select pg_cancel_backend($1)", self._pid)

    async def _who_holds(self, holder: Session, held: str | None) -> str:
        table, _, place = (held or "").partition(" ")
        what = f"table {table}" if table and not place else "what this needs"
        if place:
            what = f"a row of {table}"
            if table in _KEYS:
                key = await self._eyes.fetchval(
                    f"select {_KEYS[table]}::text from {table} where ctid = $1::text::tid", place
                )
                what = f"{table} {key}" if key else what
        return (
            f"nothing was changed: {holder} holds {what}, and did not end within {LOCK_TIMEOUT_S:g} s. Try again when it has "
            f"ended; who may, ends it with: select pg_terminate_backend({holder.pid})"
        )

    async def holder_of(self, advisory_lock: int) -> Session | None:
        """Return who holds an advisory lock of this database."""
        row = await self._eyes.fetchrow(_ADVISORY, advisory_lock)
        return None if row is None else _session(row)


@asynccontextmanager
async def watching(target: Target, connection: Connection) -> AsyncIterator[Watch]:
    """Open the second connection for the time of the block, and let the first one wait for no lock for long."""
    await connection.execute(f"set lock_timeout = {int(LOCK_TIMEOUT_S * 1000)}")
    name = f"{target.application_name} looking who waits"
    async with connected(replace(target, application_name=name)) as eyes:
        yield Watch(eyes, await connection.fetchval("select pg_backend_pid()"))  # a pooler tells another one
