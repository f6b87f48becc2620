"""
The two lanes of one cluster: take due tasks from the store, in order of urgency, and have them done.

The urgent lane is for clients that may no longer be connected at all, the bulk lane for everything else. The lanes
share no connection and no batch, so neither a mass change nor an error or a lock delays a revocation. The work itself
is done in ``batch``, and in ``fan_out`` for changes of device types.
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
from authbackend.enforcement.inventory import ByNameInventory, ListedInventory
from authbackend.enforcement.tasks import MASS, SMALL, URGENT, Task, TaskStoreError
from authbackend.errors import AuthbackendError

log = structlog.get_logger(__name__)

LONGEST_WAIT_S = 1.0
URGENT_BATCHES = 4
"""How many batches the urgent lane has in progress: while one repairs sessions, the next ones close connections."""

BULK_BATCH = 2000
_INVENTORY_LASTS_S = 30.0
_NODES_LAST_S = 1.0
"""For how long the cluster is not asked again which nodes are running."""


class _Lane:
    """
    What both lanes share.

    Attributes:
        unreachable_since: When the cluster stopped answering, on the monotonic clock; None while it answers.
    """

    def __init__(self, enforcer: Enforcer) -> None:
        self.unreachable_since: float | None = None
        self._enforcer = enforcer
        self._store = enforcer.store
        self._cluster = enforcer.actions.name
        self._backoff = Backoff(first_s=0.1, longest_s=2.0)
        self._nodes: dict[str, bool] = {}
        self._nodes_read_at = float("-inf")

    async def _running_nodes(self) -> dict[str, bool]:
        """
        Return the cluster's nodes, and whether each is running, up to a second old.

        Also notes when the cluster stops answering; when it answers again, makes the tasks due that failed meanwhile.

        Raises:
            AuthbackendError: The cluster does not answer.
        """
        if time.monotonic() < self._nodes_read_at + _NODES_LAST_S:
            return self._nodes
        try:
            nodes = await self._enforcer.actions.cluster.nodes()
        except AuthbackendError:
            self.unreachable_since = self.unreachable_since or time.monotonic()
            raise
        if self.unreachable_since is not None:
            self.unreachable_since = None
            self._backoff.reset()
            await self._store.retry_failed(self._cluster)
        self._nodes, self._nodes_read_at = nodes, time.monotonic()
        return nodes

    async def _idle(self) -> None:
        """Wait for tasks; while the cluster is unreachable, try whether it answers again instead."""
        if self.unreachable_since is None:
            await self._store.wait_for_tasks(LONGEST_WAIT_S)
            return
        await asyncio.sleep(self._backoff.next_s())
        try:
            await self._running_nodes()
        except TaskStoreError:
            raise
        except AuthbackendError as error:
            log.debug("enforcement.unreachable", cluster=self._cluster, fault=error.detail)

    async def _enforce_by_name(self, tasks: list[Task]) -> None:
        """Carry out a few tasks as one batch; postpone those that fail."""
        batch = Batch(self._enforcer, ByNameInventory(self._enforcer.actions))
        try:
            confirmation = await self._enforcer.wait_for_confirmation(versions(tasks))
            await batch.enforce(tasks, confirmation, await self._running_nodes())
        except Exception as error:
            await self._postpone(batch.unrecorded(tasks), error)

    async def _postpone(self, tasks: Iterable[Task], error: Exception) -> None:
        """
        Postpone tasks because of an error.

        Raises:
            TaskStoreError: If that is the error: nothing can be recorded, so the lane must be restarted.
        """
        if isinstance(error, TaskStoreError):
            raise error
        if isinstance(error, AuthbackendError):
            fault = error.detail
        else:  # a bug in authbackend must neither lose the tasks nor stop the lane
            log.error("enforcement.crashed", cluster=self._cluster, exc_info=error)
            fault = f"{type(error).__name__} in authbackend, see its log"
        await self._enforcer.postpone(tasks, fault)


class UrgentLane(_Lane):
    """One cluster's urgent tasks, a few batches at a time; connections and sessions are looked up by name."""

    async def run(self) -> None:
        """
        Work until cancelled.

        Raises:
            TaskStoreError: The store cannot be used.
        """
        batches: dict[int, asyncio.Task[None]] = {}  # by the ids of the tasks in them
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    running = {batch for batch in batches.values() if not batch.done()}
                    if len(running) >= URGENT_BATCHES:
                        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    batches = {id_: batch for id_, batch in batches.items() if not batch.done()}
                    tasks = await self._store.due(self._cluster, URGENT, set(batches), FEW)
                    if tasks:
                        batch = group.create_task(self._enforce_by_name(tasks))
                        batches |= dict.fromkeys((task.id for task in tasks), batch)
                    else:
                        await self._idle()
        except BaseExceptionGroup as error:
            raise error.exceptions[0] from None  # the caller handles TaskStoreError, not groups


class BulkLane(_Lane):
    """One cluster's other tasks: small changes before mass changes; for a mass change, everything is listed once."""

    def __init__(self, enforcer: Enforcer) -> None:
        super().__init__(enforcer)
        self._inventory: ListedInventory | None = None
        self._exhausted: ListedInventory | None = None
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
        """Carry out the small changes that are due; return whether there were any."""
        tasks = await self._store.due(self._cluster, SMALL, set(), FEW)
        if not tasks:
            return False
        await self._fan_out([task for task in tasks if task.kind == "device_type"])
        if others := [task for task in tasks if task.kind != "device_type"]:
            await self._enforce_by_name(others)
        return True

    async def _fan_out(self, tasks: list[Task]) -> None:
        """Carry out changes of device types; postpone those that fail."""
        for task in tasks:
            try:
                confirmation = await self._enforcer.wait_for_confirmation({task.version})
                await fan_out(self._enforcer, task, confirmation, await self._running_nodes())
            except Exception as error:
                await self._postpone([task], error)

    async def _mass_change(self, tasks: list[Task]) -> None:
        await self._fan_out([task for task in tasks if task.kind == "device_type"])
        others = [task for task in tasks if task.kind != "device_type"]
        if len(others) > FEW:
            await self._enforce_listed(others, more_are_due=len(tasks) == BULK_BATCH)
        elif others:
            await self._enforce_by_name(others)

    async def _enforce_listed(self, tasks: list[Task], *, more_are_due: bool) -> None:
        """
        Carry out many tasks as one batch, from one list of everything; postpone those that fail.

        Args:
            more_are_due: Whether these tasks are only a part of the mass change.
        """
        batch: Batch | None = None
        try:
            confirmation = await self._enforcer.wait_for_confirmation(versions(tasks))
            nodes = await self._running_nodes()
            inventory = self._inventory_for(tasks, nodes)
            if more_are_due:
                tasks = await self._connected_first(tasks, inventory)
            batch = Batch(self._enforcer, inventory, self._before_chunk)
            # A node that was down at either time may have connections that are not in the list.
            seen = {node: up and inventory.nodes.get(node, False) for node, up in nodes.items()}
            await batch.enforce(tasks, confirmation, seen)
        except Exception as error:
            await self._postpone(tasks if batch is None else batch.unrecorded(tasks), error)

    async def _connected_first(self, tasks: list[Task], inventory: ListedInventory) -> list[Task]:
        """Return the tasks of the whole mass change whose users are connected, then the other given tasks."""
        if inventory is self._exhausted:
            return tasks
        users = list(await inventory.connections_by_user())
        connected = await self._store.due_of_users(self._cluster, users, BULK_BATCH)
        if len(connected) < BULK_BATCH:
            self._exhausted = inventory  # the mass change has no more tasks about the users in this list
        connected_ids = {task.id for task in connected}
        return [*connected, *(task for task in tasks if task.id not in connected_ids)]

    def _inventory_for(self, tasks: list[Task], nodes: dict[str, bool]) -> ListedInventory:
        """
        Return the last inventory if it is recent enough for these tasks, or a new one.

        It must have been taken after all the tasks became due and after their versions were confirmed: an older list
        lacks connections that replicas still allowed.
        """
        now = time.monotonic()
        self._confirmed_at = {v: at for v, at in self._confirmed_at.items() if now - at < _INVENTORY_LASTS_S}
        all_confirmed_at = max(self._confirmed_at.setdefault(version, now) for version in versions(tasks))
        all_due_at = now - min(task.due_for_s for task in tasks)
        oldest = max(all_confirmed_at, all_due_at, now - _INVENTORY_LASTS_S)
        if self._inventory is None or self._inventory.taken_at < oldest:
            self._inventory = ListedInventory(self._enforcer.actions, nodes)
        return self._inventory

    async def _before_chunk(self) -> bool:
        """Carry out small changes before the next chunk of a mass change; return False if the lane is paused."""
        await self._small_changes()
        return not await self._store.is_paused(MASS)


def versions(tasks: Iterable[Task]) -> set[str]:
    """Return the registry versions that made some tasks."""
    return {task.version for task in tasks}
