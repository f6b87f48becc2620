"""
Watch, from a second connection, who waits for a writing session and whom it waits for, so that it can be rolled back.

A long transaction that holds row locks is rolled back as soon as somebody else wants one of the rows. PostgreSQL lets
every role read ``pg_locks`` and see pid, role and application of each session. Only members of ``pg_read_all_stats`` see
when another role's transaction began.
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

CHECK_EVERY_S = 0.025
LOCK_TIMEOUT_S = 5.0

_SESSION = """
    left join lateral (select usesysid::regrole::text as role, application_name as application, xact_start as since, state
                       from pg_stat_get_activity(s.pid)) as a on true"""

# Not counted as waiters: sessions that wait for an advisory lock, which is no row, and for a virtual transaction (CREATE
# INDEX CONCURRENTLY), which wait for all older transactions and block nobody meanwhile.
_WAITS = f"""
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

_END = "Wait until it ends, or end it if you may: select pg_terminate_backend({})"

_KEYS = {
    "device_type": "name",
    "device": "device_id",
    "account": "name",
    "topic_rule": "id",
    "device_hold": "device_id",
}


@dataclass(frozen=True, slots=True)
class Session:
    """Another session; None where this role may not see more."""

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
            else "this role may not see when its transaction began"
        )
        return f"pid {self.pid} (application {json.dumps(self.application)}, role {self.role}; {since})"


async def locked_out(connection: Connection, waited: str) -> str:
    """
    Return an error message that names who locks the registry's tables, after a read gave up waiting.

    Args:
        waited: How long it waited, as text.
    """
    statements = load_statements("registry")
    rows = await connection.fetch(statements.locked_by.sql)
    message = f"the registry cannot be read: its tables were locked for {waited}"
    if not rows:
        return f"{message}, and are free again"
    first = rows[0]
    holders = "; ".join(dict.fromkeys(str(_session(row)) for row in rows if row["exclusive"] == first["exclusive"]))
    if first["pid"] == first["exclusive"]:
        return (
            f"{message}. {holders} has an ACCESS EXCLUSIVE lock on table {first['held']}. {_END.format(first['pid'])}"
        )
    activity = await connection.fetchrow(statements.application.sql, first["exclusive"])
    since = first["waits_since"]
    began = f" since {since.isoformat(sep=' ', timespec='seconds')}" if since else ""
    waiter = f"pid {first['exclusive']} (application {json.dumps(activity and activity['application'])})"
    return (
        f"{message}. {waiter} has been waiting{began} for an ACCESS EXCLUSIVE lock on table {first['held']}, and everybody else waits "
        f"behind it. It waits for {holders}, whose transaction began earlier. {_END.format(first['exclusive'])}"
    )


class GaveWay(Exception):
    """The transaction must be rolled back because another session waits for it."""

    def __init__(self, waiter: str) -> None:
        super().__init__(waiter)
        self.waiter = waiter


def _session(row: Any) -> Session:
    since = row["since"].isoformat(sep=" ", timespec="seconds") if row["since"] else None
    return Session(row["pid"], row["role"], row["application"], since, row["state"])


class Watch:
    """Watches the locks of one session from another connection; create it with :func:`watching`."""

    def __init__(self, observer: Connection, pid: int) -> None:
        self._observer = observer
        self._pid = pid
        self._ended = asyncio.Event()
        self._waiter: Session | None = None
        self._holder: tuple[Session, str | None] | None = None
        self._fault: Exception | None = None

    def check(self) -> None:
        """
        Call this before each statement, because a session between two statements cannot be cancelled.

        Raises:
            GaveWay: Another session waits for this one.
        """
        if self._waiter is not None:
            raise GaveWay(str(self._waiter))

    @asynccontextmanager
    async def over(self, *, gives_way: bool) -> AsyncIterator[None]:
        """
        Watch for the duration of the block.

        Args:
            gives_way: Cancel the running statement when another session waits for this one.
        Raises:
            GaveWay: Another session waited, or PostgreSQL resolved a deadlock; the transaction must be rolled back.
            Unavailable: A lock was not free in time (the message names its holder), or the second connection was lost.
        """
        self._ended.clear()
        self._waiter = self._holder = self._fault = None
        writer = asyncio.current_task()
        assert writer is not None
        watcher = asyncio.create_task(self._watch(writer, gives_way))
        try:
            yield
        except asyncio.CancelledError:
            if self._fault is None or writer.uncancel():
                raise
            raise Unavailable(
                f"nothing was changed: the connection that watches for waiting sessions was lost ({self._fault}); try again"
            ) from self._fault
        except asyncpg.QueryCanceledError:
            self.check()
            raise
        except asyncpg.DeadlockDetectedError as error:
            raise GaveWay(f"a deadlock with {self._holder[0] if self._holder else 'another session'}") from error
        except asyncpg.LockNotAvailableError as error:
            if self._holder is None:
                raise
            await self._end(watcher)
            raise Unavailable(await self._describe_holder(*self._holder)) from error
        finally:
            await self._end(watcher)

    async def _end(self, watcher: asyncio.Task[None]) -> None:
        self._ended.set()
        await watcher

    async def _watch(self, writer: asyncio.Task[Any], gives_way: bool) -> None:
        try:
            while not self._ended.is_set():
                await self._check_locks(gives_way)
                try:
                    async with asyncio.timeout(CHECK_EVERY_S):
                        await self._ended.wait()
                except TimeoutError:
                    continue
        except Exception as error:
            self._fault = error
            if not self._ended.is_set():
                writer.cancel()

    async def _check_locks(self, gives_way: bool) -> None:
        waiter = None
        for row in await self._observer.fetch(_WAITS, self._pid):
            if row["part"] == "holder":
                self._holder = (_session(row), row["held"])
            else:
                waiter = _session(row)
        if waiter is not None and gives_way:
            self._waiter = waiter
            # Repeated at each check, because a cancellation that arrives between two statements is lost.
            await self._observer.execute("select pg_cancel_backend($1)", self._pid)

    async def _describe_holder(self, holder: Session, held: str | None) -> str:
        table, _, place = (held or "").partition(" ")
        what = f"table {table}" if table and not place else "what this needs"
        if place:
            what = f"a row of {table}"
            if table in _KEYS:
                key = await self._observer.fetchval(
                    f"select {_KEYS[table]}::text from {table} where ctid = $1::text::tid", place
                )
                what = f"{table} {key}" if key else what
        return (
            f"nothing was changed: {holder} holds {what}, and did not end within {LOCK_TIMEOUT_S:g} s. Try again when it has "
            f"ended, or end it if you may: select pg_terminate_backend({holder.pid})"
        )

    async def holder_of(self, advisory_lock: int) -> Session | None:
        """Return the session that holds an advisory lock in this database."""
        row = await self._observer.fetchrow(_ADVISORY, advisory_lock)
        return None if row is None else _session(row)


@asynccontextmanager
async def watching(target: Target, connection: Connection) -> AsyncIterator[Watch]:
    """Open the second connection for the duration of the block, and limit how long the first one waits for locks."""
    await connection.execute(f"set lock_timeout = {int(LOCK_TIMEOUT_S * 1000)}")
    name = f"{target.application_name} looking who waits"
    async with connected(replace(target, application_name=name)) as observer:
        # Not connection.get_server_pid(): a pooler gives its clients another number.
        yield Watch(observer, await connection.fetchval("select pg_backend_pid()"))
