"""
Leader election for enforcement, and the parts that the leader runs: lanes and a sweep per cluster, timers, monitoring.

Each part has its own database connection and is restarted on its own when it fails, so an error in one part never stops
another. The lock and the store are passed in; ``service.components`` wires them to PostgreSQL.
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
from authbackend.logs.fault_log import FaultLog
from authbackend.policy.decide import DecisionSettings
from authbackend.registry.store import Store

log = structlog.get_logger(__name__)

BACKLOG_EVERY_S = 2.0
RECORD_DUE_EVERY_S = 0.5
HAND_OVER_S = 20.0
"""A leader that has reached no cluster for this long steps down, so that another replica can try."""

_URGENT_CONFIRM_S, _BULK_CONFIRM_S = 0.5, 2.0
_URGENT_CALLS, _BULK_CALLS, _SWEEP_CALLS = 4, 4, 1

OpenStore = Callable[[str], AbstractAsyncContextManager[TaskStore]]
Part = Callable[[TaskStore], Awaitable[None]]


class LeaderObserver(EnforcerObserver, SweepObserver, Protocol):
    """Receives everything that the parts report, for metrics."""

    def leads(self, leading: bool) -> None:
        """Set whether this replica is the leader."""

    def backlog(self, backlog: Backlog) -> None:
        """Set what has not been done yet."""


class Lock(Protocol):
    """The leader's lock, while this replica holds it."""

    async def lost(self) -> None:
        """Wait until the lock is lost, then raise ``Unavailable``."""


@dataclass(frozen=True, slots=True)
class LeaderSettings:
    """
    The settings of enforcement.

    Args:
        clusters: By name, a function that creates a client of the cluster with its own connections.
        per_second: How many closing calls each bulk lane and each sweep may make per second.
    """

    clusters: Mapping[str, Callable[[], Cluster]]
    per_second: float
    decisions: DecisionSettings
    sweep: SweepSettings


class Leader:
    """
    Enforcement by this replica, whenever no other replica is the leader.

    Args:
        lock: Waits for the lock, then holds it for the duration of the block.
        open_store: Opens a store for the part with the given name.
        registry: This replica's copy of the registry.
        reachability: That of the database, shared with the other parts of this process.
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
        self._logged_overdue: set[tuple[str, str | None]] = set()

    async def run(self) -> None:
        """Wait for the lock and lead while holding it, again and again until cancelled."""
        backoff = Backoff()
        step_downs = FaultLog("enforcement.left")  # its counterpart is enforcement.leading, here or at another replica
        while True:
            try:
                while self._copy_age_s() > OLDEST_COPY_S:  # noqa: ASYNC110 - the copy has no event to wait for
                    await asyncio.sleep(0.1)
                async with self._lock() as lock:
                    backoff.reset()
                    step_downs.succeeded()
                    await self._lead(lock)
            except AuthbackendError as error:
                step_downs.failed(error.detail)
            except Exception:  # a bug in authbackend must not end enforcement for good
                log.exception("enforcement.crashed")
            await self._reachability.pause(backoff)

    def _copy_age_s(self) -> float:
        """Return the age of the registry copy; infinite until it is loaded."""
        with self._registry.reader() as registry:
            return registry.age_s

    async def _lead(self, lock: Lock) -> None:
        """Run all parts until the lock is lost or another replica should lead."""
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
        running = [asyncio.create_task(self._keep_running(name, part)) for name, part in parts.items()]
        running += [asyncio.create_task(lock.lost()), asyncio.create_task(self._step_down_if_useless())]
        try:
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            self._observer.leads(False)

    async def _keep_running(self, name: str, part: Part) -> None:
        """Run a part, and restart it when it fails."""
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
            except Exception:  # a bug in one part must not stop the others
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
        """Carry out expiries and scheduled changes when they are due."""
        logged = None
        while True:
            fault = await store.record_due()
            if fault and fault != logged:
                log.error("schedule.failed", fault=fault)
            logged = fault
            await asyncio.sleep(RECORD_DUE_EVERY_S)

    async def _monitor(self, store: TaskStore) -> None:
        """Report the backlog, log pauses and late scheduled changes, and delete old tasks."""
        paused = None
        while True:
            await store.forget_done()
            backlog = await store.backlog()
            self._observer.backlog(backlog)
            self._log_overdue(backlog.overdue)
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

    def _log_overdue(self, overdue: tuple[Overdue, ...]) -> None:
        """Log each scheduled change that is late, once for each session that blocks it."""
        for each in overdue:
            if (each.device_id, each.holder) not in self._logged_overdue:
                log.warning(
                    "schedule.blocked",
                    device=each.device_id,
                    status=each.status,
                    due=str(each.at),
                    held_by=each.holder or "nobody is seen holding its row",
                )
        self._logged_overdue = {(each.device_id, each.holder) for each in overdue}

    async def _step_down_if_useless(self) -> None:
        """
        Watch whether this replica can enforce at all.

        Raises:
            Unavailable: It has reached no cluster for ``HAND_OVER_S``, or its copy of the registry is too old.
        """
        while True:
            await asyncio.sleep(1.0)
            if (age_s := self._copy_age_s()) > OLDEST_COPY_S:
                raise Unavailable(
                    f"the copy of the registry is {age_s:.0f} s old; this replica stops enforcing, so that another can"
                )
            unreachable = [lane.unreachable_since for lane in self._lanes.values()]
            if unreachable and all(at is not None and time.monotonic() - at > HAND_OVER_S for at in unreachable):
                raise Unavailable(
                    f"no cluster could be reached for {HAND_OVER_S:g} s; this replica stops enforcing, so that another"
                    " can try"
                )
