"""
Leader election for enforcement, and the parts that the leader runs.

Each part has a connection to the database of its own and is started again by itself when it fails, so that a fault of one
never stops another.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

import structlog

from authbackend.backoff import Backoff, Reachability
from authbackend.enforcement.batch import OLDEST_COPY_S, Enforcer, EnforcerObserver
from authbackend.enforcement.clusters import Cluster, ClusterActions
from authbackend.enforcement.lanes import BulkLane, UrgentLane
from authbackend.enforcement.sweep import Sweep, SweepObserver, SweepSettings
from authbackend.enforcement.tasks import MASS, URGENT, Backlog, Overdue, TaskStore
from authbackend.errors import AuthbackendError, Unavailable
from authbackend.fault_log import FaultLog
from authbackend.policy.decide import DecisionSettings
from authbackend.registry.store import Store

log = structlog.get_logger(__name__)

BACKLOG_EVERY_S = 2.0
RECORD_DUE_EVERY_S = 0.5
HAND_OVER_S = 20.0
"""After this time without reaching any cluster, another replica gets a chance."""

_URGENT_CONFIRM_S, _BULK_CONFIRM_S = 0.5, 2.0
_URGENT_CALLS, _BULK_CALLS, _SWEEP_CALLS = 4, 4, 1

OpenStore = Callable[[str], AbstractAsyncContextManager[TaskStore]]
Part = Callable[[TaskStore], Awaitable[None]]


class LeaderObserver(EnforcerObserver, SweepObserver, Protocol):
    """Is told everything, for metrics."""

    def leads(self, leading: bool) -> None:
        """Whether this replica is the one that enforces."""

    def backlog(self, backlog: Backlog) -> None:
        """What is open."""


class Lock(Protocol):
    """The lock of the one replica that enforces, while it is held."""

    async def lost(self) -> None:
        """Wait until it is held no more."""


@dataclass(frozen=True, slots=True)
class LeaderSettings:
    """
    How to enforce.

    Args:
        clusters: By name, a function that opens connections of its own to the cluster.
        per_second: Users whose connections are closed a second for everything that is not urgent.
    """

    clusters: Mapping[str, Callable[[], Cluster]]
    per_second: float
    decisions: DecisionSettings
    sweep: SweepSettings


class Leader:
    """
    Enforces whenever no other replica does.

    Args:
        lock: Waits for the lock, and holds it for the time of the block.
        open_store: Opens a store of its own for the part of that name.
        registry: The registry in memory of this replica.
        reachability: Of the database.
    """

    def __init__(
        self,
        lock: Callable[[], AbstractAsyncContextManager[Lock]],
        open_store: OpenStore,
        registry: Store,
        observer: LeaderObserver,
        settings: LeaderSettings,
        reachability: Reachability,
    ) -> None:
        self._lock = lock
        self._open_store = open_store
        self._registry = registry
        self._observer = observer
        self._settings = settings
        self._reachability = reachability
        self._lanes: dict[str, UrgentLane | BulkLane] = {}
        self._blocked: set[tuple[str, str | None]] = set()

    async def run(self) -> None:
        """Take turns with the other replicas, until cancelled."""
        backoff = Backoff()
        left = FaultLog("enforcement.left")  # its end is enforcement.leading, here or at another replica
        while True:
            try:
                while self._copy_age_s() > OLDEST_COPY_S:  # noqa: ASYNC110 - the store tells nobody
                    await asyncio.sleep(0.1)
                async with self._lock() as lock:
                    backoff.reset()
                    left.succeeded()
                    await self._lead(lock)
            except AuthbackendError as error:
                left.failed(error.detail)
            except Exception:  # a bug must not end enforcement for good
                log.exception("enforcement.crashed")
            await self._reachability.pause(backoff)

    def _copy_age_s(self) -> float:
        """Return how old the copy of the registry is; infinite before it has been loaded."""
        with self._registry.reader() as registry:
            return registry.age_s

    async def _lead(self, lock: Lock) -> None:
        log.info("enforcement.leading")
        self._observer.leads(True)
        self._lanes.clear()
        parts: dict[str, Part] = {"due": self._record_due, "monitor": self._monitor}
        for name, open_cluster in self._settings.clusters.items():
            parts |= {
                f"urgent {name}": self._urgent(open_cluster),
                f"bulk {name}": self._bulk(open_cluster),
                f"sweep {name}": self._sweep(open_cluster),
            }
        running = [asyncio.create_task(self._keep(name, part)) for name, part in parts.items()]
        running += [asyncio.create_task(lock.lost()), asyncio.create_task(self._hand_over())]
        try:
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            self._observer.leads(False)

    async def _keep(self, name: str, part: Part) -> None:
        """Run a part, again and again if it fails."""
        backoff = Backoff()
        faults = FaultLog("enforcement.part_failed", "enforcement.part_running", part=name)
        while True:
            try:
                async with self._open_store(name) as store:
                    self._reachability.succeeded()
                    backoff.reset()
                    faults.succeeded()
                    await part(store)
            except AuthbackendError as error:
                faults.failed(error.detail)
            except Exception:  # a bug in one part must not end the others
                log.exception("enforcement.crashed", part=name)
            await self._reachability.pause(backoff)

    def _enforcer(
        self, store: TaskStore, cluster: Cluster, lane: str, per_second: float | None, calls: int, confirm_s: float
    ) -> Enforcer:
        actions = ClusterActions(cluster, per_second, calls, lambda: store.is_paused(lane))
        return Enforcer(store, actions, self._registry.reader(), self._observer, self._settings.decisions, confirm_s)

    def _urgent(self, open_cluster: Callable[[], Cluster]) -> Part:
        async def part(store: TaskStore) -> None:
            async with contextlib.aclosing(open_cluster()) as cluster:
                lane = UrgentLane(self._enforcer(store, cluster, URGENT, None, _URGENT_CALLS, _URGENT_CONFIRM_S))
                self._lanes[cluster.name] = lane
                await lane.run()

        return part

    def _bulk(self, open_cluster: Callable[[], Cluster]) -> Part:
        async def part(store: TaskStore) -> None:
            async with contextlib.aclosing(open_cluster()) as cluster:
                per_second = self._settings.per_second
                await BulkLane(self._enforcer(store, cluster, MASS, per_second, _BULK_CALLS, _BULK_CONFIRM_S)).run()

        return part

    def _sweep(self, open_cluster: Callable[[], Cluster]) -> Part:
        async def part(store: TaskStore) -> None:
            async with contextlib.aclosing(open_cluster()) as cluster:
                actions = ClusterActions(
                    cluster, self._settings.per_second, _SWEEP_CALLS, lambda: store.is_paused(MASS)
                )
                reader = self._registry.reader()
                settings = self._settings
                await Sweep(store, actions, reader, self._observer, settings.decisions, settings.sweep).run()

        return part

    async def _record_due(self, store: TaskStore) -> None:
        """Make what has become due by time."""
        fault = None
        while True:
            found = await store.record_due()
            if found and found != fault:
                log.error("schedule.failed", fault=found)
            fault = found
            await asyncio.sleep(RECORD_DUE_EVERY_S)

    async def _monitor(self, store: TaskStore) -> None:
        """Count what is open, name what is held up, and forget what was done long ago, whether clusters answer or not."""
        paused = None
        while True:
            await store.forget_done()
            backlog = await store.backlog()
            self._observer.backlog(backlog)
            self._name_blocked(backlog.overdue)
            if backlog.paused != paused:
                paused = backlog.paused
                if paused is None:
                    log.info("enforcement.resumed")
                else:
                    log.warning(
                        "enforcement.paused",
                        scope=paused.scope,
                        until=str(paused.until),
                        by=paused.by,
                        claimed_by=paused.claimed_by,
                    )
            await asyncio.sleep(BACKLOG_EVERY_S)

    def _name_blocked(self, overdue: tuple[Overdue, ...]) -> None:
        blocked = {(each.device_id, each.holder) for each in overdue}
        for each in overdue:
            if (each.device_id, each.holder) not in self._blocked:
                log.warning(
                    "schedule.blocked",
                    device=each.device_id,
                    status=each.status,
                    due=str(each.at),
                    held_by=each.holder or "nobody is seen holding its row",
                )
        self._blocked = blocked

    async def _hand_over(self) -> None:
        """
        Notice that this replica cannot do what must be done.

        Raises:
            Unavailable: No cluster can be reached from here, for so long that another replica should try; or what this one
                knows of the registry is too old.
        """
        while True:
            await asyncio.sleep(1.0)
            if (age_s := self._copy_age_s()) > OLDEST_COPY_S:
                raise Unavailable(f"the copy of the registry is {age_s:.0f} s old; another replica may enforce")
            since = [lane.unreachable_since for lane in self._lanes.values()]
            if since and all(each is not None and time.monotonic() - each > HAND_OVER_S for each in since):
                raise Unavailable(f"no cluster could be reached for {HAND_OVER_S:g} s; another replica may try")
