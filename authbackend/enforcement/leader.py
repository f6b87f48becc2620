"""Being the one replica that enforces: takes the lock, works, and lets another one try when it cannot."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import structlog

from authbackend.enforcement.clusters import Clusters
from authbackend.enforcement.lanes import Enforcer
from authbackend.enforcement.lanes import Observer as EnforcerObserver
from authbackend.enforcement.sweep import Observer as SweepObserver
from authbackend.enforcement.sweep import Sweep, SweepSettings
from authbackend.enforcement.tasks import Backlog, TaskStore
from authbackend.errors import AuthbackendError
from authbackend.policy.decide import DecisionSettings
from authbackend.registry.store import Store

log = structlog.get_logger(__name__)

BACKLOG_EVERY_S = 2.0
_PAUSE_S = 2.0


class Observer(EnforcerObserver, SweepObserver, Protocol):
    """Is told everything, for metrics."""

    def leads(self, leading: bool) -> None:
        """Whether this replica is the one that enforces."""

    def backlog(self, backlog: Backlog) -> None:
        """What is open."""


class Leader:
    """
    Enforces whenever no other replica does.

    Args:
        leading: Waits for the lock, and holds it for the time of the block.
        store: The registry in memory of this replica.
        per_second: Users whose connections are closed a second.
    """

    def __init__(
        self,
        leading: Callable[[], AbstractAsyncContextManager[TaskStore]],
        store: Store,
        clusters: Clusters,
        observer: Observer,
        decisions: DecisionSettings,
        sweep: SweepSettings,
    ) -> None:
        self._leading = leading
        self._store = store
        self._clusters = clusters
        self._observer = observer
        self._decisions = decisions
        self._sweep = sweep

    async def run(self) -> None:
        """Take turns with the other replicas, until cancelled."""
        while True:
            try:
                async with self._leading() as work:
                    await self._lead(work)
            except AuthbackendError as error:
                log.warning("enforcement.left", fault=error.detail)
            except Exception:  # a fault of ours must not end enforcement for good
                log.exception("enforcement.crashed")
            await asyncio.sleep(_PAUSE_S * random.uniform(0.5, 1.0))

    async def _lead(self, work: TaskStore) -> None:
        log.info("enforcement.leading")
        self._observer.leads(True)
        enforcer = Enforcer(work, self._clusters, self._store.reader(), self._observer, self._decisions)
        sweep = Sweep(work, self._clusters, self._store.reader(), self._observer, self._decisions, self._sweep)
        tasks = [asyncio.create_task(each) for each in (enforcer.run(), sweep.run(), self._count(work))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._observer.leads(False)
            with contextlib.suppress(Exception):
                await self._clusters.close()

    async def _count(self, work: TaskStore) -> None:
        while True:
            self._observer.backlog(await work.backlog())
            await asyncio.sleep(BACKLOG_EVERY_S)
