"""The work of enforcement in the database, and the lock that one replica at a time holds to do it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from authbackend.enforcement.tasks import Backlog, Confirmation, Task
from authbackend.errors import NotFound, Unavailable
from authbackend.postgres.connection import Connection, Target, connect, connected, translated_errors
from authbackend.postgres.statements import load_statements

LEADER_LOCK = 724003
CHANNEL = "enforcement"
KEEP_DONE_S = 30 * 86400.0
LOCK_EVERY_S = 0.5
_LOOK_EVERY_S = 0.02


class PostgresTaskStore:
    """Implements ``enforcement.tasks.TaskStore`` on one connection, which holds the lock."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._statements = load_statements("enforcement")
        self._woken = asyncio.Event()
        self._turn = asyncio.Lock()  # enforcer and sweep share the connection

    async def listen(self) -> None:
        """Be wait_for_tasks by what is noted from now on."""
        with translated_errors():
            await self._connection.add_listener(CHANNEL, lambda *_: self._woken.set())
        self._connection.add_termination_listener(lambda *_: self._woken.set())

    async def record_due(self) -> None:
        """Note what has become due by time."""
        await self._fetch("note_expired")
        await self._fetch("apply_schedule")

    async def due(self, most: int) -> list[Task]:
        """Return the open tasks that are due, those of small changes first."""
        self._woken.clear()
        return [_task(row) for row in await self._fetch("due", most)]

    async def wait_for_tasks(self, longest_s: float) -> None:
        """Wait until something is noted, at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(longest_s):
                await self._woken.wait()
        if self._connection.is_closed():
            raise Unavailable("the connection that holds the lock was lost")

    async def confirmation(self, versions: set[str]) -> Confirmation:
        """Return who decides by all of these versions."""
        rows = await self._fetch("confirmation", sorted(versions))
        by, missing = ([row["name"] for row in rows if row["serves"] is serves] for serves in (True, False))
        return Confirmation(by, missing)

    async def hold(self, device_ids: list[str]) -> str:
        """Hold the logins of devices that are active, and return the version that does it."""
        with translated_errors():
            async with self._turn, self._connection.transaction():
                await self._connection.execute(self._statements.hold.sql, device_ids)
                return str(await self._connection.fetchval("select pg_current_xact_id()::text"))

    async def release(self, device_ids: list[str], tasks: list[int]) -> None:
        """End holds, but for devices that have other open tasks than these."""
        if device_ids:
            await self._fetch("release", device_ids, tasks)

    async def add(self, parent: Task, devices: dict[str, dict[str, Any]]) -> int:
        """Note tasks for devices on behalf of another, once each, and return how many there are by now."""
        details = [json.dumps(value) for value in devices.values()]
        await self._fetch("add_children", parent.id, list(devices), details)
        return sum((await self.children(parent)).values())

    async def children(self, parent: Task) -> dict[str, int]:
        """Return how many tasks were noted on behalf of this one, by state."""
        return {row["state"]: row["number"] for row in await self._fetch("children", parent.id)}

    async def check_later(self, receipts: dict[int, dict[str, Any]], after_s: float) -> None:
        """Keep what was done, and make the tasks due for another look."""
        if receipts:
            await self._fetch("check_later", list(receipts), [json.dumps(r) for r in receipts.values()], after_s)

    async def finish(self, receipts: dict[int, dict[str, Any]]) -> None:
        """Close tasks with their receipts."""
        if receipts:
            await self._fetch("finish", list(receipts), [json.dumps(r) for r in receipts.values()])

    async def failed(self, tasks: list[int], fault: str, after_s: float) -> None:
        """Keep tasks open, with why they could not be done, and make them due again."""
        await self._fetch("failed", tasks, fault, after_s)

    async def backlog(self) -> Backlog:
        """Return what is open."""
        (row,) = await self._fetch("backlog")
        tasks = {"waiting": row["waiting"], "checking": row["checking"]}
        return Backlog(tasks, row["oldest_s"], row["holds"], row["overdue_holds"])

    async def serial_states(self, serials: list[str]) -> dict[str, str]:
        """Return the state of the certificates with these serials that are on record."""
        return {row["serial"]: row["state"] for row in await self._fetch("serial_states", serials)}

    async def keep_sweep(self, cluster: str, report: dict[str, Any]) -> None:
        """Keep the report of a sweep in the place of the one before, and forget tasks that were done long ago."""
        await self._fetch("prune", KEEP_DONE_S)
        await self._fetch("keep_sweep", cluster, json.dumps(report))

    async def _fetch(self, statement: str, *values: Any) -> list[Any]:
        with translated_errors():
            async with self._turn:
                return await self._connection.fetch(getattr(self._statements, statement).sql, *values)


def _task(row: Any) -> Task:
    return Task(
        id=row["id"],
        version=row["version"],
        kind=row["kind"],
        name=row["name"],
        causes=frozenset(row["causes"]),
        details=json.loads(row["details"]),
        noted_at=row["noted_at"],
        state=row["state"],
        attempts=row["attempts"],
        parent=row["parent"],
        receipt=json.loads(row["receipt"]) if row["receipt"] else {},
    )


@contextlib.asynccontextmanager
async def leading(target: Target, hold_limit_s: float) -> AsyncIterator[PostgresTaskStore]:
    """
    Wait for the lock of enforcement and hold it for the time of the block.

    The lock goes with the connection: PostgreSQL frees it as soon as this process, or the way to it, is gone.

    Raises:
        AuthbackendError: The database cannot be reached or refuses.
    """
    connection = await connect(replace(target, application_name=f"{target.application_name} enforcement"))
    try:
        with translated_errors():
            # A peer that is gone without a word frees the lock within seconds, too.
            await connection.execute(
                "set tcp_keepalives_idle = 2; set tcp_keepalives_interval = 1; set tcp_keepalives_count = 3"
            )
            while not await connection.fetchval("select pg_try_advisory_lock($1)", LEADER_LOCK):  # noqa: ASYNC110
                await asyncio.sleep(LOCK_EVERY_S)
            await connection.execute(load_statements("enforcement").enable.sql, hold_limit_s)
        table = PostgresTaskStore(connection)
        await table.listen()
        yield table
    finally:
        with contextlib.suppress(Exception):
            await connection.close(timeout=1)


async def list_tasks(
    target: Target, *, state: str | None = None, kind: str | None = None, name: str | None = None, limit: int = 100
) -> list[dict[str, Any]]:
    """Return tasks with their receipts, the newest first; ``state`` may be ``open``."""
    async with connected(target) as connection:
        rows = await connection.fetch(load_statements("enforcement").listed.sql, state, kind, name, limit)
        return [_plain(row) for row in rows]


async def get_task(target: Target, number: int) -> dict[str, Any]:
    """
    Return a task with its receipt.

    Raises:
        NotFound: There is none of this number.
    """
    async with connected(target) as connection:
        row = await connection.fetchrow(load_statements("enforcement").one.sql, number)
    if row is None:
        raise NotFound(f"there is no enforcement task {number}")
    return _plain(row)


async def retry(target: Target, number: int | None) -> int:
    """
    Make a task due at once, or all open ones, and return how many; one that is done is done again.

    Raises:
        NotFound: There is none of this number.
    """
    async with connected(target) as connection:
        changed = int(await connection.fetchval(load_statements("enforcement").retry.sql, number))
    if number is not None and not changed:
        raise NotFound(f"there is no enforcement task {number}")
    return changed


async def disable(target: Target) -> None:
    """Note no work any more and end all holds; a service with ``enforcement.clusters`` switches it on again."""
    async with connected(target) as connection:
        await connection.execute(load_statements("enforcement").disable.sql)


async def list_sweeps(target: Target) -> list[dict[str, Any]]:
    """Return the last sweep of each cluster."""
    async with connected(target) as connection:
        rows = await connection.fetch(load_statements("enforcement").sweeps.sql)
        return [{**row, "report": json.loads(row["report"])} for row in rows]


async def enforced(target: Target, version: str, timeout_s: float) -> list[dict[str, Any]] | None:
    """
    Wait until what a version took away is taken away, and return its tasks; None if nobody enforces.

    Tasks that are not done in time are returned as they are.
    """
    statements = load_statements("enforcement")
    deadline = asyncio.get_running_loop().time() + timeout_s
    async with connected(target) as connection:
        if not await connection.fetchval(statements.enabled.sql):
            return None
        while True:
            rows = await connection.fetch(statements.of_version.sql, version.partition("@")[0])
            left = deadline - asyncio.get_running_loop().time()
            if all(row["state"] == "done" for row in rows) or left <= 0:
                return [_plain(row) for row in rows]
            await asyncio.sleep(min(left, _LOOK_EVERY_S))


def _plain(row: Any) -> dict[str, Any]:
    found = dict(row)
    for name in ("receipt", "details"):
        if found.get(name):
            found[name] = json.loads(found[name])
    return found
