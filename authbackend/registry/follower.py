"""
Keeps the copy up to date: loads the registry, follows the change feed, and compares the copy with the database.

One refresh runs at a time. A notification only wakes the loop; changes are read from the change feed, which is also
polled, so a lost notification delays a change by a second and loses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import structlog

from authbackend import clocks
from authbackend.backoff import Backoff, Reachability
from authbackend.clocks import Instant
from authbackend.errors import AuthbackendError, NoRoom, Unwritable
from authbackend.logs.fault_log import FaultLog
from authbackend.registry import lost_changes
from authbackend.registry.position import FeedPosition
from authbackend.registry.records import Patch
from authbackend.registry.snapshot import JournalEntry, SnapshotFolder
from authbackend.registry.store import Reader, Store
from authbackend.registry.writability import Writability

log = structlog.get_logger(__name__)

NO_ROOM_S = 10.0
"""Pause when the registry does not fit into memory: each attempt reads all of it from the database for nothing."""
CONFIRM_ON_DISK_S = 10.0
_YIELD_EVERY = 2000


@dataclass(frozen=True, slots=True)
class FeedRead:
    """
    The result of one read of the change feed.

    Args:
        confirmed_at: The database's clock when the read began.
    """

    position: FeedPosition
    confirmed_at: datetime


@dataclass(frozen=True, slots=True)
class RefreshResult:
    """
    The outcome of one refresh.

    Args:
        full: Whether the whole registry was loaded.
        changed: Rows read.
        duration_s: From the start of the refresh until decisions use it.
    """

    full: bool
    changed: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class SuspectRows:
    """
    Suspect rows and recent changes, read from the database in one snapshot.

    Args:
        patch: The changes since the position.
        present: The suspect rows as they are in the database.
        sizes: Number of rows by entity.
    """

    patch: Patch
    present: Patch
    sizes: dict[str, int]
    feed_read: FeedRead


class Feed(Protocol):
    """Reads the registry from the database; implemented in ``postgres.change_feed``."""

    async def load(self, store: Store, synced_at: float) -> FeedRead:
        """Load the whole registry into a store."""

    async def changes(self, position: FeedPosition, devices: int) -> tuple[Patch, FeedRead] | None:
        """Return the changes since a position, None if a full load is needed; ``devices``: how many the copy has."""

    async def suspects(self, store: Store) -> Patch:
        """Return the rows in which a store, which may change meanwhile, seems to differ from the database."""

    async def confirm(self, position: FeedPosition, devices: int, suspects: Patch) -> SuspectRows | None:
        """Read suspect rows again, with the changes since a position; None if a full load is needed anyway."""

    async def later_changes(self, position: FeedPosition) -> set[lost_changes.Key] | None:
        """
        Return the entries that the change feed lists after a position in an earlier incarnation of the database.

        None if the feed does not reach back that far.
        """

    async def prune(self) -> None:
        """Delete change rows that every reader has read."""

    def wake_ups(self) -> contextlib.AbstractAsyncContextManager[Callable[[], Awaitable[None]]]:
        """Listen for changes; the yielded function waits for the next one and raises if the connection is lost."""

    async def close(self) -> None:
        """Close the connection; the next call opens one."""


class FollowerObserver(Protocol):
    """Receives what the follower does, for metrics and for the other replicas."""

    def refreshed(self, feed_read: FeedRead, refreshed: RefreshResult, *, lasting: bool) -> None:
        """
        A refresh succeeded.

        Args:
            lasting: False if the change could not be written to disk: a restart could lose it.
        """

    def refresh_failed(self, fault: str) -> None:
        """A refresh failed; the copy is unchanged."""

    def compared(self, differences: int) -> None:
        """The copy was compared with the database row by row."""

    def served_changes_gone(self, number: int) -> None:
        """The database, in a new incarnation, has lost changes that were served."""


@dataclass(frozen=True, slots=True)
class SyncTimes:
    """Intervals in seconds; see ``settings.Registry``."""

    poll_s: float = 1.0
    compare_s: float = 3600.0
    prune_s: float = 60.0


class RegistryFollower:
    """
    Follows the database and writes the store that decisions are made from.

    Args:
        reachability: Shared by everything in this process that needs the database.
        writability: Shared by everything in this process that writes to it; its fault is recorded in the store.
    """

    def __init__(
        self,
        feed: Feed,
        store: Store,
        observer: FollowerObserver,
        times: SyncTimes | None = None,
        snapshot_folder: SnapshotFolder | None = None,
        reachability: Reachability | None = None,
        writability: Writability | None = None,
    ) -> None:
        self.store = store
        self.fault: str | None = "the registry has not been loaded yet"
        self._faults = FaultLog("registry.refresh_failed")
        self._feed = feed
        self._observer = observer
        self._times = times or SyncTimes()
        self._snapshot_folder = snapshot_folder
        self._next_disk_write = 0.0  # monotonic: when to confirm on disk again that the copy is current
        self._wake = asyncio.Event()
        self._reachability = reachability or Reachability()
        self._writability = writability or Writability()
        self._backoff = Backoff()
        self._no_room_backoff = Backoff(NO_ROOM_S, NO_ROOM_S)
        self._looking = asyncio.Lock()  # one refresh at a time: an older result must never replace a newer one
        self._next_prune = 0.0

    async def run(self) -> None:
        """Follow the database until cancelled; database errors never end it."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen())
            tasks.create_task(self._compare_regularly())
            while True:
                await self._refresh_and_wait()

    async def _refresh_and_wait(self) -> None:
        """Refresh once, then wait for a notification or the next poll; after a failure, pause."""
        self._wake.clear()
        try:
            async with self._looking:
                await self.refresh()
                await self._maintain()
        except NoRoom as error:
            await self._failed(error.detail)
            await asyncio.sleep(self._no_room_backoff.next_s())
        except AuthbackendError as error:
            await self._failed(error.detail)
            await self._reachability.pause(self._backoff)
        except Exception as error:  # a bug in authbackend must not stop the follower
            fault = f"{type(error).__name__} while reading the registry"
            if self.fault != fault:
                log.exception("registry.refresh_crashed")
            await self._failed(fault)
            await self._reachability.pause(self._backoff)
        else:
            self._backoff.reset()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._times.poll_s):
                    await self._wake.wait()

    async def refresh(self, *, full: bool = False) -> RefreshResult:
        """
        Read the database once and apply the changes, or load the whole registry.

        Raises:
            AuthbackendError: The database could not be read; the copy is unchanged.
        """
        began = Instant.now()
        state = self.store.state()
        changes = None
        if state is not None and not full:
            changes = await self._feed.changes(state.position, self.store.sizes()["device"])
        if changes is not None:
            return await self._apply(*changes, began)
        with self.store.reader() as before:  # keeps the served version readable until it has been compared
            feed_read = await self._feed.load(self.store, began.uptime)
            sizes = self.store.sizes()
            refreshed = RefreshResult(True, sum(sizes.values()), clocks.uptime() - began.uptime)
            log.info("registry.loaded", **sizes, duration_s=round(refreshed.duration_s, 3))
            await self._succeeded(
                feed_read,
                refreshed,
                JournalEntry(began, feed_read.position, Patch(), feed_read.confirmed_at.timestamp()),
            )
            if state is not None and not feed_read.position.same_life(state.position):
                await self._report_lost_changes(before, state.position)
        return refreshed

    async def _report_lost_changes(self, before: Reader, position: FeedPosition) -> None:
        try:
            later = await self._feed.later_changes(position)
        except AuthbackendError:
            later = None
        differing_keys = set()
        with self.store.reader() as after:
            for number, key in enumerate(lost_changes.differing(before, after)):
                if key is not None:
                    differing_keys.add(key)
                if number % _YIELD_EVERY == 0:
                    await asyncio.sleep(0)
        self._observer.served_changes_gone(lost_changes.report(differing_keys, later))

    async def _apply(self, patch: Patch, feed_read: FeedRead, began: Instant) -> RefreshResult:
        database_time = feed_read.confirmed_at.timestamp()
        if len(patch):
            self.store.apply(patch, feed_read.position, began.uptime, database_time)
        else:
            fault = self._writability.fault
            self.store.note(
                position=feed_read.position, synced_at=began.uptime, fault=fault, database_time=database_time
            )
        refreshed = RefreshResult(False, len(patch), clocks.uptime() - began.uptime)
        if len(patch):
            log.info("registry.changed", rows=len(patch), duration_s=round(refreshed.duration_s, 4))
        await self._succeeded(feed_read, refreshed, JournalEntry(began, feed_read.position, patch, database_time))
        return refreshed

    async def _succeeded(self, feed_read: FeedRead, refreshed: RefreshResult, entry: JournalEntry) -> None:
        if self.fault is not None:
            log.info("registry.following")
            self._reachability.succeeded()
        self._faults.succeeded()
        self.fault = None
        if self._writability.fault is not None and (len(entry.patch) or refreshed.full):
            self.store.note(fault=self._writability.fault)
        lasting = await self._write_to_disk(entry, new_image=refreshed.full)
        self._observer.refreshed(feed_read, refreshed, lasting=lasting)

    async def _write_to_disk(self, entry: JournalEntry, *, new_image: bool) -> bool:
        """Write a refresh to disk where needed; return False if that failed: a crash could then lose the change."""
        snapshot_folder = self._snapshot_folder
        if snapshot_folder is None:
            return True
        now = time.monotonic()
        if not (new_image or len(entry.patch) or snapshot_folder.wants_image or now >= self._next_disk_write):
            return True
        try:
            if new_image or snapshot_folder.wants_image:
                snapshot_folder.close_journal()
                await asyncio.to_thread(snapshot_folder.save, self.store, entry)
            else:
                await asyncio.to_thread(snapshot_folder.append, entry)
        except OSError as error:
            log.error("registry.not_on_disk", fault=error.strerror)
            return False
        self._next_disk_write = now + CONFIRM_ON_DISK_S
        return True

    async def compare(self) -> int:
        """
        Compare the copy with the database row by row, and reload it if they differ.

        This catches changes that bypass the triggers, for example a restore that disabled them. The copy keeps
        following meanwhile.
        """
        suspects = await self._feed.suspects(self.store)
        async with self._looking:
            began = Instant.now()
            state = self.store.state()
            assert state is not None
            confirmed = await self._feed.confirm(state.position, self.store.sizes()["device"], suspects)
            if confirmed is None:
                await self.refresh(full=True)
                return 0
            await self._apply(confirmed.patch, confirmed.feed_read, began)
            differences = self.store.differences(confirmed.present) or sum(
                abs(size - confirmed.sizes[entity]) for entity, size in self.store.sizes().items()
            )
            self._observer.compared(differences)
            if differences:
                log.error("registry.differs", rows=differences, next="reloading it")
                await self.refresh(full=True)
            return differences

    async def _maintain(self) -> None:
        now = time.monotonic()
        self.store.forget_dead_readers()
        if now >= self._next_prune:
            self._next_prune = now + self._times.prune_s
            try:
                await self._feed.prune()
            except Unwritable as error:
                self._writability.failed(error.detail)

    async def _compare_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._times.compare_s)
            try:
                if self.store.state() is not None:
                    await self.compare()
            except AuthbackendError as error:
                log.warning("registry.compare_failed", fault=error.detail)
            except Exception:  # a bug in authbackend must not end the comparisons for good
                log.exception("registry.compare_crashed")

    async def _failed(self, detail: str) -> None:
        self._faults.failed(detail, copy_age_s=self._age_s())
        self.fault = detail
        with contextlib.suppress(AuthbackendError):
            self.store.note(fault=detail)
        self._observer.refresh_failed(detail)
        await self._feed.close()

    def _age_s(self) -> float | None:
        state = self.store.state()
        return None if state is None else round(clocks.uptime() - state.synced_at, 3)

    async def _listen(self) -> None:
        backoff = Backoff()
        crash: str | None = None
        while True:
            try:
                async with self._feed.wake_ups() as next_change:
                    self._reachability.succeeded()
                    self._wake.set()
                    while True:
                        await next_change()
                        self._wake.set()
                        backoff.reset()
            except AuthbackendError:
                pass  # polling continues, and reports what is wrong with the database
            except Exception as error:  # a bug in authbackend must not end listening for good
                if crash != str(error):
                    log.exception("registry.listen_crashed")
                crash = str(error)
            await self._reachability.pause(backoff)
