"""
The lanes of one cluster: the urgent one, for whoever may not be connected any more, and the bulk one, for everything else.

They share no connection, queue or batch, so that a mass change, a fault or a lock keeps no revocation waiting.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import structlog

from authbackend.backoff import Backoff
from authbackend.enforcement.batch import Batch, Enforcer
from authbackend.enforcement.clusters import FEW
from authbackend.enforcement.fan_out import fan_out
from authbackend.enforcement.inventory import ByName, Listed
from authbackend.enforcement.tasks import MASS, SMALL, URGENT, Task, TaskStoreError
from authbackend.errors import AuthbackendError

log = structlog.get_logger(__name__)

LONGEST_WAIT_S = 1.0
URGENT_BATCHES = 4
"""While one batch repairs sessions, the next ones close connections."""

BULK_BATCH = 2000
_LIST_LASTS_S = 30.0
_SEEN_LASTS_S = 1.0
"""So long the nodes that were seen running are not asked for again."""


class _Lane:
    """What both lanes have in common."""

    def __init__(self, enforcer: Enforcer) -> None:
        self.unreachable_since: float | None = None
        self._enforcer = enforcer
        self._store = enforcer.store
        self._cluster = enforcer.actions.name
        self._backoff = Backoff(first_s=0.1, longest_s=2.0)
        self._seen: dict[str, bool] = {}
        self._seen_at = float("-inf")

    async def _nodes(self) -> dict[str, bool]:
        """
        Return the nodes as they were a moment ago; what failed while the cluster was unreachable is due when it is back.

        Raises:
            AuthbackendError: They cannot be asked for.
        """
        if time.monotonic() < self._seen_at + _SEEN_LASTS_S:
            return self._seen
        try:
            found = await self._enforcer.actions.cluster.nodes()
        except AuthbackendError:
            self.unreachable_since = self.unreachable_since or time.monotonic()
            raise
        if self.unreachable_since is not None:
            self.unreachable_since = None
            self._backoff.reset()
            await self._store.retry_failed(self._cluster)
        self._seen, self._seen_at = found, time.monotonic()
        return found

    async def _idle(self) -> None:
        """Wait for tasks, and notice meanwhile that a cluster is back."""
        if self.unreachable_since is None:
            await self._store.wait_for_tasks(LONGEST_WAIT_S)
            return
        await asyncio.sleep(self._backoff.next_s())
        try:
            await self._nodes()
        except TaskStoreError:
            raise
        except AuthbackendError as error:
            log.debug("enforcement.unreachable", cluster=self._cluster, fault=error.detail)

    async def _by_name(self, tasks: list[Task]) -> None:
        """Do a few tasks."""
        batch = Batch(self._enforcer, ByName(self._enforcer.actions))
        try:
            confirmed = await self._enforcer.confirmed(versions(tasks))
            await batch.enforce(tasks, confirmed, await self._nodes())
        except Exception as error:
            await self._put_off(batch.left(tasks), error)

    async def _put_off(self, tasks: Iterable[Task], error: Exception) -> None:
        """
        Keep tasks open that could not be done.

        Raises:
            TaskStoreError: That was why.
        """
        if isinstance(error, TaskStoreError):
            raise error
        if isinstance(error, AuthbackendError):
            fault = error.detail
        else:  # a bug must neither lose the work nor end it
            log.error("enforcement.crashed", cluster=self._cluster, exc_info=error)
            fault = f"{type(error).__name__} in the service, see its log"
        await self._enforcer.failed(tasks, fault)


class UrgentLane(_Lane):
    """Serves one cluster's urgent tasks, a few batches at a time; each connection and session is asked for by name."""

    async def run(self) -> None:
        """
        Work until cancelled.

        Raises:
            TaskStoreError: The store cannot be used.
        """
        being_done: dict[int, asyncio.Task[None]] = {}
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    running = {each for each in being_done.values() if not each.done()}
                    if len(running) >= URGENT_BATCHES:
                        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    being_done = {id_: each for id_, each in being_done.items() if not each.done()}
                    tasks = await self._store.due(self._cluster, URGENT, set(being_done), FEW)
                    if tasks:
                        being_done |= dict.fromkeys(
                            (task.id for task in tasks), group.create_task(self._by_name(tasks))
                        )
                    else:
                        await self._idle()
        except BaseExceptionGroup as error:
            raise error.exceptions[0] from None


class BulkLane(_Lane):
    """Serves one cluster's other tasks: small changes before mass changes, of which many are looked for by one list."""

    def __init__(self, enforcer: Enforcer) -> None:
        super().__init__(enforcer)
        self._listed: Listed | None = None
        self._taken_from: Listed | None = None
        self._confirmed_at: dict[str, float] = {}

    async def run(self) -> None:
        """
        Work until cancelled.

        Raises:
            TaskStoreError: The store cannot be used.
        """
        while True:
            small = await self._small_changes()
            if tasks := await self._store.due(self._cluster, MASS, set(), BULK_BATCH):
                await self._mass_change(tasks)
            elif not small:
                await self._idle()

    async def _small_changes(self) -> bool:
        """Do the small changes that are due; return whether there were any."""
        tasks = await self._store.due(self._cluster, SMALL, set(), FEW)
        if not tasks:
            return False
        await self._types([task for task in tasks if task.kind == "device_type"])
        if others := [task for task in tasks if task.kind != "device_type"]:
            await self._by_name(others)
        return True

    async def _types(self, tasks: list[Task]) -> None:
        for task in tasks:
            try:
                confirmed = await self._enforcer.confirmed({task.version})
                await fan_out(self._enforcer, task, confirmed, await self._nodes())
            except Exception as error:
                await self._put_off([task], error)

    async def _mass_change(self, tasks: list[Task]) -> None:
        await self._types([task for task in tasks if task.kind == "device_type"])
        others = [task for task in tasks if task.kind != "device_type"]
        if len(others) <= FEW:
            if others:
                await self._by_name(others)
            return
        batch: Batch | None = None
        left = others
        try:
            confirmed = await self._enforcer.confirmed(versions(others))
            nodes = await self._nodes()
            inventory = self._inventory(others, nodes)
            if len(tasks) == BULK_BATCH:  # more are to come, and those that are connected should not wait for them
                left = others = await self._connected_first(others, inventory)
            batch = Batch(self._enforcer, inventory, self._between)
            seen = {node: up and inventory.nodes.get(node, False) for node, up in nodes.items()}
            await batch.enforce(others, confirmed, seen)
        except Exception as error:
            await self._put_off(left if batch is None else batch.left(left), error)

    async def _connected_first(self, tasks: list[Task], inventory: Listed) -> list[Task]:
        """Return tasks with those of the whole mass change before them that are about users in the list."""
        if inventory is self._taken_from:
            return tasks
        connected = await self._store.due_of_users(self._cluster, list(await inventory.users()), BULK_BATCH)
        if len(connected) < BULK_BATCH:
            self._taken_from = inventory  # all of them: the next part need not ask
        known = {task.id for task in connected}
        return [*connected, *(task for task in tasks if task.id not in known)]

    def _inventory(self, tasks: list[Task], nodes: dict[str, bool]) -> Listed:
        """Return lists that were begun after all of these tasks were due and replicas decided by their versions."""
        now = time.monotonic()
        self._confirmed_at = {v: at for v, at in self._confirmed_at.items() if now - at < _LIST_LASTS_S}
        since = max(self._confirmed_at.setdefault(version, now) for version in versions(tasks))
        since = max(since, now - min(task.due_for_s for task in tasks))
        listed = self._listed
        if listed is None or listed.taken_at < since or now - listed.taken_at > _LIST_LASTS_S:
            listed = self._listed = Listed(self._enforcer.actions, nodes)
        return listed

    async def _between(self) -> bool:
        """Between two parts of a mass change: small changes first; return False if it is paused."""
        await self._small_changes()
        return not await self._store.is_paused(MASS)


def versions(tasks: Iterable[Task]) -> set[str]:
    """Return the versions of tasks."""
    return {task.version for task in tasks}
