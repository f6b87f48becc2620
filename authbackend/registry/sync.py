"""
Keeps the copy true: load, follow the change feed, notice staleness.

One refresh at a time. A notification only wakes the loop up; what changed is read from the change feed, which is
also polled, so a lost notification delays a change by a second and loses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import structlog

from authbackend.errors import AuthbackendError
from authbackend.registry.snapshot import Patch, Snapshot

log = structlog.get_logger(__name__)

LONGEST_BACK_OFF_S = 5.0


@dataclass(frozen=True, slots=True)
class Refreshed:
    """
    What one look at the database gave.

    Args:
        full: True when the copy was loaded anew.
        changed: Rows read.
        duration_s: From the start of the look to the moment decisions use it.
    """

    full: bool
    changed: int
    duration_s: float


class Reader(Protocol):
    """Reads the registry from the database; ``postgres.feed`` has the real one."""

    async def load(self) -> Snapshot:
        """Return a whole copy."""

    async def changes(self, snapshot: Snapshot) -> tuple[Patch, Snapshot] | None:
        """Return what changed since a snapshot and a bare snapshot with the new mark, None if it must be loaded."""

    async def suspects(self, snapshot: Snapshot) -> Patch:
        """Return the rows in which a copy, which may move on meanwhile, seems to differ from the database."""

    async def confirm(self, snapshot: Snapshot, suspects: Patch) -> int | None:
        """Bring a copy up to date and return how many rows really differ; None if it must be loaded anew anyway."""

    async def prune(self) -> None:
        """Delete change rows that every reader has seen."""

    def wake_ups(self) -> contextlib.AbstractAsyncContextManager[Callable[[], Awaitable[None]]]:
        """Listen for changes; the value waits for the next one and raises when the connection is lost."""

    async def close(self) -> None:
        """Drop the connection; the next call opens one."""


class Observer(Protocol):
    """Is told what happens, for metrics."""

    def refreshed(self, snapshot: Snapshot, refreshed: Refreshed) -> None:
        """A look at the database succeeded."""

    def refresh_failed(self) -> None:
        """A look at the database failed; the copy stays as it is."""

    def compared(self, differences: int) -> None:
        """The copy was compared with the database row by row."""


@dataclass(frozen=True, slots=True)
class SyncTimes:
    """Intervals in seconds; see ``settings.Registry``."""

    poll_s: float = 1.0
    max_staleness_s: float = 900.0
    compare_s: float = 3600.0
    prune_s: float = 60.0


class RegistryCopy:
    """
    The copy that decisions are made from.

    ``snapshot`` is None until the first load. Staleness counts from the start of the last look that succeeded.
    """

    def __init__(self, reader: Reader, observer: Observer, times: SyncTimes | None = None) -> None:
        self.snapshot: Snapshot | None = None
        self.fault: str | None = "the registry has not been loaded yet"
        self._reader = reader
        self._observer = observer
        self._times = times or SyncTimes()
        self._wake = asyncio.Event()
        self._synced_at: float | None = None  # monotonic
        self._failures = 0
        self._looking = asyncio.Lock()  # one look at a time: an older result must never follow a newer one
        self._next_prune = 0.0

    @property
    def age_s(self) -> float | None:
        """Seconds since the start of the last look that succeeded, None before the first."""
        return None if self._synced_at is None else time.monotonic() - self._synced_at

    @property
    def stale(self) -> bool:
        """True when the copy is too old to decide by."""
        return self._synced_at is None or time.monotonic() - self._synced_at > self._times.max_staleness_s

    async def run(self) -> None:
        """Follow the database until cancelled; never raises for a fault of the database."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen())
            tasks.create_task(self._compare_regularly())
            while True:
                await self._look()
                await self._pause()

    async def _look(self) -> None:
        self._wake.clear()
        try:
            async with self._looking:
                await self.refresh()
                await self._maintain()
        except AuthbackendError as error:
            await self._failed(error.detail)
        except Exception as error:  # a fault of ours must not stop the copy from following
            log.exception("registry.refresh_crashed")
            await self._failed(f"{type(error).__name__} while reading the registry")

    async def refresh(self, *, full: bool = False) -> Refreshed:
        """
        Look at the database once and apply what changed, or load everything anew.

        Raises:
            AuthbackendError: The database could not be read; the copy stays as it was.
        """
        started = time.monotonic()
        changes = None if full or self.snapshot is None else await self._reader.changes(self.snapshot)
        if changes is None or self.snapshot is None:
            self.snapshot = await self._reader.load()
            refreshed = Refreshed(True, sum(self.snapshot.sizes().values()), time.monotonic() - started)
            log.info("registry.loaded", **self.snapshot.sizes(), duration_s=round(refreshed.duration_s, 3))
        else:
            patch, bare = changes
            assert bare.mark is not None
            self.snapshot.apply(patch, bare.mark)
            refreshed = Refreshed(False, len(patch), time.monotonic() - started)
            if len(patch):
                log.info("registry.changed", rows=len(patch), duration_s=round(refreshed.duration_s, 4))
        self._synced_at = started
        self._failures = 0
        if self.fault is not None:
            log.info("registry.following")
        self.fault = None
        self._observer.refreshed(self.snapshot, refreshed)
        return refreshed

    async def compare(self) -> int:
        """
        Compare the copy with the database row by row and load it anew when they differ.

        Finds what no trigger can see, for example a restore that disabled them. The copy follows on meanwhile.
        """
        assert self.snapshot is not None
        suspects = await self._reader.suspects(self.snapshot)
        async with self._looking:
            differences = await self._reader.confirm(self.snapshot, suspects)
            if differences is not None:
                self._observer.compared(differences)
            if differences:
                log.error("registry.differs", rows=differences, next="loading it anew")
            if differences != 0:
                await self.refresh(full=True)
            return differences or 0

    async def _maintain(self) -> None:
        now = time.monotonic()
        if now >= self._next_prune:
            self._next_prune = now + self._times.prune_s
            await self._reader.prune()

    async def _compare_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._times.compare_s)
            try:
                if self.snapshot is not None:
                    await self.compare()
            except AuthbackendError as error:
                log.warning("registry.compare_failed", fault=error.detail)
            except Exception:  # a fault of ours must not end the comparisons for good
                log.exception("registry.compare_crashed")

    async def _failed(self, detail: str) -> None:
        self._failures += 1
        if self.fault != detail:
            log.warning("registry.refresh_failed", fault=detail, copy_age_s=self.age_s)
        self.fault = detail
        self._observer.refresh_failed()
        await self._reader.close()

    async def _pause(self) -> None:
        """Wait for a notification or the next poll; after failures for a growing, jittered time."""
        wait = self._times.poll_s
        if self._failures:
            wait = min(LONGEST_BACK_OFF_S, wait * 2 ** min(self._failures - 1, 8)) * random.uniform(0.5, 1.0)
            await asyncio.sleep(wait)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                await self._wake.wait()

    async def _listen(self) -> None:
        while True:
            try:
                async with self._reader.wake_ups() as next_change:
                    self._wake.set()
                    while True:
                        await next_change()
                        self._wake.set()
            except AuthbackendError:
                pass  # the poll follows meanwhile, and says what is wrong with the database
            except Exception:  # a fault of ours must not end the listening for good
                log.exception("registry.listen_crashed")
            await asyncio.sleep(random.uniform(0.5, 1.0) * self._times.poll_s)
