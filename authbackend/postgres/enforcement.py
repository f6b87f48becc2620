"""Read and write the enforcement tasks, and hold the lock that makes one replica the leader of enforcement."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import asyncpg
import structlog

from authbackend.enforcement.tasks import Backlog, Listed, Overdue, Pause, ReplicaConfirmation, Task, TaskStoreError
from authbackend.errors import AuthbackendError, Conflict, NotFound, Unavailable
from authbackend.postgres.connection import Connection, Target, connect, connected, name_actor, translated_errors
from authbackend.postgres.listener import Listener
from authbackend.postgres.locks import ENFORCE
from authbackend.postgres.statements import load_statements

log = structlog.get_logger(__name__)

CHANNEL = "enforcement"
KEEP_DONE_S = 30 * 86400.0
LOCK_EVERY_S = 0.5
_POLL_EVERY_S = 0.02
_PAUSE_LASTS_S = 1.0
_LOCK_TIMEOUT_S = 0.5
"""Statements here skip rows locked by others; one that still has to wait for a lock gives up after this time."""


class PostgresTaskStore:
    """Implements ``enforcement.tasks.TaskStore`` on a connection of its own."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._statements = load_statements("enforcement")
        self._listener = Listener(connection, self._notified)
        self._pause: Pause | None = None
        self._pause_lasts_until = float("-inf")  # monotonic; until then, ``_pause`` need not be read again
        self._notifications = 0
        self._turn = asyncio.Lock()  # several batches may run concurrently on this connection

    async def listen(self) -> None:
        """Start to listen for new tasks and changed pauses."""
        with translated_errors():
            await self._connection.execute(f"set lock_timeout = '{_LOCK_TIMEOUT_S}s'")
        await self._listener.listen(CHANNEL)

    def _notified(self) -> None:
        """Handle a new task or a changed pause: the channel does not tell which."""
        self._notifications += 1
        self._pause_lasts_until = float("-inf")

    async def due(self, cluster: str, lane: str, being_done: set[int], limit: int) -> list[Task]:
        """Return open tasks that are due, longest overdue first; none while the lane is paused."""
        return [_task(row) for row in await self._fetch("due", cluster, lane, list(being_done), limit)]

    async def due_of_users(self, cluster: str, users: list[str], limit: int) -> list[Task]:
        """Return the mass-change tasks about these users that are due for the first time."""
        return [_task(row) for row in await self._fetch("due_of_users", cluster, users, limit)]

    async def wait_for_tasks(self, longest_s: float) -> None:
        """Wait for a new task, for up to ``longest_s``."""
        try:
            await self._listener.wait(longest_s)
        except Unavailable as error:
            raise TaskStoreError(error.detail) from error

    async def paused(self) -> Pause | None:
        """Return the current pause, if any."""
        return next(map(_pause, await self._fetch("paused")), None)

    async def is_paused(self, lane: str) -> bool:
        """Return whether a lane is paused; reads the database after a notification, and once a second."""
        if time.monotonic() >= self._pause_lasts_until:
            notifications = self._notifications
            self._pause = await self.paused()
            if notifications == self._notifications:  # otherwise a pause may have begun after this read
                self._pause_lasts_until = time.monotonic() + _PAUSE_LASTS_S
        return self._pause is not None and self._pause.stops(lane)

    async def confirmation(self, versions: set[str]) -> ReplicaConfirmation:
        """Return which replicas serve all of these versions."""
        rows = await self._fetch("confirmation", sorted(versions))
        return ReplicaConfirmation(
            [row["name"] for row in rows if row["serves"]],
            [row["name"] for row in rows if not row["serves"]],
            [row["name"] for row in rows if not row["serves"] and row["live"]],
        )

    async def hold(self, device_ids: list[str]) -> str:
        """
        Hold the logins of those devices that are active, and return the registry version with the holds.

        Raises:
            Conflict: Another transaction is changing one of the holds.
        """
        try:
            with translated_errors():
                async with self._turn, self._connection.transaction():
                    await self._connection.execute(self._statements.hold.sql, device_ids)
                    return str(await self._connection.fetchval("select pg_current_xact_id()::text"))
        except AuthbackendError as error:
            if self._connection.is_closed():
                raise TaskStoreError(error.detail) from error
            raise Conflict(f"the login of {', '.join(device_ids[:3])} cannot be held: {error.detail}") from error

    async def release(self, device_ids: list[str], tasks: list[int]) -> None:
        """End the holds of devices that have no open tasks besides these."""
        if device_ids:
            await self._fetch("release", device_ids, tasks)

    async def add(self, parent: Task, devices: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Add tasks for devices on behalf of another task; see the Protocol."""
        names = [device_id for device_id, _ in devices]
        await self._fetch("add_children", parent.id, names, [json.dumps(details) for _, details in devices])

    async def hold_client_ids(self, device_type: str) -> None:
        """Once every cluster has been checked, hold only those client ids moved to a type that the receipts name."""
        await self._fetch("hold_client_ids", device_type)

    async def release_client_ids(self, device_type: str, task: int) -> None:
        """Let the devices of a type use the client ids they gained, unless another open task is about these."""
        await self._fetch("release_client_ids", device_type, task)

    async def children(self, parent: Task) -> tuple[int, int]:
        """Return how many devices have tasks on behalf of this one, and how many of these tasks are open."""
        (row,) = await self._fetch("children", parent.id)
        return row["number"], row["open"]

    async def check_later(self, receipts: dict[int, dict[str, Any]], after_s: float) -> None:
        """Save the receipts so far, and make the tasks due for another check."""
        if receipts:
            await self._fetch("check_later", list(receipts), [json.dumps(r) for r in receipts.values()], after_s)

    async def finish(self, receipts: dict[int, dict[str, Any]], state: str = "done") -> None:
        """Close tasks with their receipts."""
        if receipts:
            await self._fetch("finish", list(receipts), [json.dumps(r) for r in receipts.values()], state)

    async def nothing_found(self, tasks: list[int], common: dict[str, Any], after_s: float | None) -> None:
        """Record for many tasks at once that nothing was connected or stored; for ``after_s`` see the Protocol."""
        if tasks:
            await self._fetch("nothing_found", tasks, json.dumps(common), after_s)

    async def failed(self, tasks: dict[int, tuple[dict[str, Any] | None, float]], fault: str) -> None:
        """Record a failed attempt: the tasks stay open, each with its receipt so far and the seconds until the retry."""
        receipts = [None if receipt is None else json.dumps(receipt) for receipt, _ in tasks.values()]
        await self._fetch("failed", list(tasks), receipts, [after_s for _, after_s in tasks.values()], fault)

    async def retry_failed(self, cluster: str) -> None:
        """Make the failed tasks of a cluster due now, because it answers again."""
        await self._fetch("retry_failed", cluster)

    async def lists_of(self, certificates: list[tuple[str, str]]) -> dict[tuple[str, str], Listed]:
        """Return on which revocation lists certificates, given by issuer and serial number, are."""
        rows = await self._fetch("lists_of", [one[0] for one in certificates], [one[1] for one in certificates])
        return {(row["issuer"], row["serial"]): Listed(row["number"], json.loads(row["nodes"])) for row in rows}

    async def certificates_on_record(self, serials: list[str], names: list[str]) -> list[dict[str, Any]]:
        """Return the certificates with these serial numbers, and the revoked ones with these common names."""
        return [dict(row) for row in await self._fetch("certificates_on_record", serials, names)]

    async def save_sweep(self, cluster: str, report: dict[str, Any]) -> None:
        """Save the report of a sweep, replacing the previous one of the cluster."""
        await self._fetch("save_sweep", cluster, json.dumps(report))

    async def forget_done(self) -> None:
        """Delete tasks that were finished more than ``KEEP_DONE_S`` ago."""
        await self._fetch("prune", KEEP_DONE_S)

    async def record_due(self) -> str | None:
        """Process what has become due: expiries and scheduled changes. Return why one could not be made, if so."""
        await self._fetch("note_expired")
        (row,) = await self._fetch("apply_schedule")
        await self._fetch("release_forgotten")
        return None if row["fault"] is None else str(row["fault"])

    async def backlog(self) -> Backlog:
        """Return counts of open tasks and holds, and what is overdue."""
        (row,) = await self._fetch("backlog")
        tasks = {"waiting": row["waiting"], "checking": row["checking"]}
        overdue = tuple(map(_overdue, await self._fetch("overdue")))
        return Backlog(tasks, row["oldest_s"], row["holds"], row["overdue_holds"], await self.paused(), overdue)

    async def _fetch(self, statement: str, *values: Any) -> list[Any]:
        try:
            with translated_errors():
                async with self._turn:
                    return await self._connection.fetch(getattr(self._statements, statement).sql, *values)
        except AuthbackendError as error:
            if isinstance(error.__cause__, asyncpg.LockNotAvailableError) and not self._connection.is_closed():
                raise Conflict(error.detail) from error  # a row is locked by somebody else; the caller retries later
            raise TaskStoreError(error.detail) from error


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
        cluster=row["cluster"],
        lane=row["lane"],
        active=row["active"],
        due_for_s=row["due_for_s"],
        parent=row["parent"],
        receipt=json.loads(row["receipt"]) if row["receipt"] else {},
    )


def _pause(row: Any) -> Pause:
    return Pause(row["scope"], row["until"], row["by"], row["claimed_by"])


def _overdue(row: Any) -> Overdue:
    holder = None
    if row["pid"] is not None:
        began = f" since {row['since']:%Y-%m-%d %H:%M:%S} UTC" if row["since"] else ""
        holder = f"process {row['pid']} ({row['application'] or 'no application name'}, role {row['role']}){began}"
    return Overdue(row["device_id"], row["at"], row["status"], holder)


@contextlib.asynccontextmanager
async def open_store(target: Target, part: str) -> AsyncIterator[PostgresTaskStore]:
    """
    Open a task store for one part of enforcement, for the duration of the block.

    Raises:
        AuthbackendError: The database cannot be reached or refuses.
    """
    connection = await connect(replace(target, application_name=f"{target.application_name} enforcement {part}"))
    try:
        store = PostgresTaskStore(connection)
        await store.listen()
        yield store
    finally:
        with contextlib.suppress(Exception):
            await connection.close(timeout=1)


class LeaderLock:
    """The lock of the replica that leads enforcement; PostgreSQL releases it when its connection ends."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lost = asyncio.Event()
        connection.add_termination_listener(lambda *_: self._lost.set())

    async def lost(self) -> None:
        """Wait until the lock is lost, which is when its connection ends, then raise ``Unavailable``."""
        while not self._lost.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._lost.wait()
                    break
            with translated_errors():  # a lost peer is noticed only when something is sent
                await self._connection.fetchval("select 1")
        raise Unavailable("the connection that holds the lock was lost")


@contextlib.asynccontextmanager
async def leading(
    target: Target, hold_limit_s: float, clusters: list[str], lock_taken: Callable[[bool], object] = lambda _: None
) -> AsyncIterator[LeaderLock]:
    """
    Wait for the enforcement lock and hold it for the duration of the block; changes create tasks for these clusters.

    Args:
        lock_taken: Called while waiting with whether a session that is no replica holds the lock, so that nobody enforces.
    Raises:
        AuthbackendError: The database cannot be reached or refuses.
    """
    connection = await connect(replace(target, application_name=f"{target.application_name} enforcement"))
    try:
        with translated_errors():
            # If this host disappears without closing the connection, the server still releases the lock within seconds.
            await connection.execute(
                "set tcp_keepalives_idle = 2; set tcp_keepalives_interval = 1; set tcp_keepalives_count = 3"
            )
            statements = load_statements("enforcement")
            try:
                await _take_lock(connection, statements.strangers_with_the_lock.sql, lock_taken)
            finally:
                lock_taken(False)
            await connection.execute(statements.enable.sql, hold_limit_s, clusters)
            await connection.execute(statements.adopt.sql, clusters)
            for row in await connection.fetch(statements.unknown_clusters.sql, clusters):
                log.warning(
                    "enforcement.cluster_unknown",
                    cluster=row["name"],
                    next=f"tasks for it stay open; if it is gone for good: authbackend enforcement forget {row['name']}",
                )
        yield LeaderLock(connection)
    finally:
        with contextlib.suppress(Exception):
            await connection.close(timeout=1)


async def _take_lock(connection: Connection, strangers: str, lock_taken: Callable[[bool], object]) -> None:
    logged: set[int] = set()
    while not await connection.fetchval("select pg_try_advisory_lock($1)", ENFORCE):
        holders = await connection.fetch(strangers, ENFORCE)
        lock_taken(bool(holders))
        for row in holders:
            if row["pid"] not in logged:
                log.error(
                    "enforcement.lock_taken",
                    **row,
                    next=f"nothing is enforced while this session holds the lock; end it: select pg_terminate_backend({row['pid']})",
                )
        logged = {row["pid"] for row in holders}
        await asyncio.sleep(LOCK_EVERY_S)


async def list_tasks(
    target: Target, *, state: str | None = None, kind: str | None = None, name: str | None = None, limit: int = 100
) -> list[dict[str, Any]]:
    """Return tasks with their receipts, newest first; ``state`` may also be ``open``."""
    async with connected(target) as connection:
        rows = await connection.fetch(load_statements("enforcement").listed.sql, state, kind, name, limit)
        return [_plain(row) for row in rows]


async def get_task(target: Target, number: int) -> dict[str, Any]:
    """
    Return a task with its receipt.

    Raises:
        NotFound: There is no task with this number.
    """
    async with connected(target) as connection:
        row = await connection.fetchrow(load_statements("enforcement").one.sql, number)
    if row is None:
        raise NotFound(f"there is no enforcement task {number}")
    return _plain(row)


async def retry(target: Target, actor: str, number: int | None) -> int:
    """
    Make a task, or all open ones, due now, and return how many; a finished task is done again.

    Args:
        number: The task; None for all open ones.
    Raises:
        NotFound: There is no task with this number.
    """
    async with connected(target) as connection, connection.transaction():
        await name_actor(connection, actor)
        changed = int(await connection.fetchval(load_statements("enforcement").retry.sql, number))
    if number is not None and not changed:
        raise NotFound(f"there is no enforcement task {number}")
    return changed


async def disable(target: Target, actor: str) -> tuple[int, int]:
    """
    Switch enforcement off and end all holds; a service with ``enforcement.clusters`` switches it on again.

    Returns:
        How many holds were ended: of devices, and of types whose client ids moved.
    """
    async with connected(target) as connection, connection.transaction():
        await name_actor(connection, actor)
        row = await connection.fetchrow(load_statements("enforcement").disable.sql)
    assert row is not None
    return int(row["holds"]), int(row["moves"])


async def pause(target: Target, actor: str, scope: str) -> Pause:
    """Pause the bulk lane or all lanes (``scope``: ``bulk`` or ``all``) for an hour, and return the pause."""
    statements = load_statements("enforcement")
    async with connected(target) as connection, connection.transaction():
        await name_actor(connection, actor)
        await connection.execute(statements.pause.sql, scope)
        return _pause(await connection.fetchrow(statements.paused.sql))


async def resume(target: Target, actor: str) -> bool:
    """End the pause, and return whether there was one."""
    async with connected(target) as connection, connection.transaction():
        await name_actor(connection, actor)
        return bool(await connection.fetchval(load_statements("enforcement").resume.sql))


async def paused(target: Target) -> Pause | None:
    """Return the current pause, if any."""
    async with connected(target) as connection:
        row = await connection.fetchrow(load_statements("enforcement").paused.sql)
        return None if row is None else _pause(row)


async def list_lock_takers(target: Target) -> list[dict[str, Any]]:
    """Return the sessions that hold the enforcement lock although they are no replica, so that nobody enforces."""
    async with connected(target) as connection:
        rows = await connection.fetch(load_statements("enforcement").strangers_with_the_lock.sql, ENFORCE)
        return [dict(row) for row in rows]


async def list_overdue(target: Target) -> list[Overdue]:
    """Return overdue scheduled changes, each with the session that keeps its device's row locked."""
    async with connected(target) as connection:
        return [_overdue(row) for row in await connection.fetch(load_statements("enforcement").overdue.sql)]


async def forget_cluster(target: Target, actor: str, name: str) -> int:
    """
    Stop creating tasks for a cluster, close its open ones as superseded, and return how many were closed.

    Raises:
        NotFound: There is no cluster of this name, and no open task for one.
    """
    async with connected(target) as connection, connection.transaction():
        await name_actor(connection, actor)
        row = await connection.fetchrow(load_statements("enforcement").forget_cluster.sql, name)
    assert row is not None
    if not row["clusters"] and not row["tasks"]:
        raise NotFound(f"there is no cluster {name!r} to enforce on")
    return int(row["tasks"])


async def list_sweeps(target: Target) -> list[dict[str, Any]]:
    """Return the report of the latest sweep of each cluster."""
    async with connected(target) as connection:
        rows = await connection.fetch(load_statements("enforcement").sweeps.sql)
        return [{**row, "report": json.loads(row["report"])} for row in rows]


async def enforced(target: Target, version: str, timeout_s: float) -> list[dict[str, Any]] | None:
    """
    Wait until the tasks of a registry version are finished, and return them; None if enforcement is off.

    Tasks that are not finished in time are returned as they are.
    """
    return await _finished(target, timeout_s, load_statements("enforcement").of_version.sql, version.partition("@")[0])


async def settled(target: Target, kind: str, names: Sequence[str], timeout_s: float) -> list[dict[str, Any]] | None:
    """
    Wait until the open tasks about these names are finished; return them, and the latest one of each name and cluster.

    Otherwise as :func:`enforced`. Finished tasks are deleted after ``KEEP_DONE_S``.
    """
    return await _finished(target, timeout_s, load_statements("enforcement").last_about.sql, kind, list(names))


async def is_enabled(target: Target) -> bool:
    """Return whether enforcement is on; without it, scheduled changes are not made either."""
    async with connected(target) as connection:
        return bool(await connection.fetchval(load_statements("enforcement").enabled.sql))


async def _finished(target: Target, timeout_s: float, statement: str, *values: Any) -> list[dict[str, Any]] | None:
    deadline = asyncio.get_running_loop().time() + timeout_s
    async with connected(target) as connection:
        if not await connection.fetchval(load_statements("enforcement").enabled.sql):
            return None
        while True:
            rows = await connection.fetch(statement, *values)
            left = deadline - asyncio.get_running_loop().time()
            if all(row["finished_at"] is not None for row in rows) or left <= 0:
                return [_plain(row) for row in rows]
            await asyncio.sleep(min(left, _POLL_EVERY_S))


def _plain(row: Any) -> dict[str, Any]:
    plain = dict(row)
    for name in ("receipt", "details"):
        if plain.get(name):
            plain[name] = json.loads(plain[name])
    return plain
