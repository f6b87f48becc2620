"""Tells the other replicas, through the database, which version this one serves; and learns about them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import structlog

from authbackend.backoff import Backoff, Reachability
from authbackend.errors import AuthbackendError, Unwritable
from authbackend.registry.follower import FeedRead
from authbackend.registry.position import FeedPosition
from authbackend.registry.writability import Writability

log = structlog.get_logger(__name__)

SHORTEST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 1.0
_LEAVING_S = 2.0


@dataclass(frozen=True, slots=True)
class Peers:
    """
    The replicas as the database knows them.

    Args:
        states: How many are ``live``, ``silent`` and ``stopped``.
        ages_s: By name, how long ago each was in step, by the database's clock; of several, the longest.
        twins: How many run from a folder from which another runs as well.
    """

    states: dict[str, int]
    ages_s: dict[str, float]
    twins: int = 0


class ReplicaTable(Protocol):
    """Writes this replica's row; ``postgres.replicas`` has the real one."""

    async def announce(self, position: FeedPosition, confirmed_at: datetime) -> None:
        """Say which version this replica serves."""

    async def sign_off(self, *, comes_back: bool) -> None:
        """Say that this replica stops."""

    async def peers(self) -> Peers:
        """Return what the database knows of all replicas."""

    async def close(self) -> None:
        """Drop the connection."""


class AnnouncerObserver(Protocol):
    """Is told about the replicas, for metrics."""

    def peers(self, peers: Peers) -> None:
        """Take what the database knows of the replicas."""


class ReplicaAnnouncer:
    """
    Announces the newest version, at most fifty times a second and at least once a second.

    A fault of the database is not told here: the copy's own look meets it too, and this replica then counts as one
    that may still be serving what it had. Except one that only a writer meets.

    Args:
        comes_back: Whether this replica can start again by itself, from a copy on disk.
        reachability: Shared with whatever else in this process needs the database.
        writability: Is told whether the announcement could be written.
    """

    def __init__(
        self,
        replica_table: ReplicaTable,
        observer: AnnouncerObserver,
        reachability: Reachability,
        *,
        comes_back: bool,
        writability: Writability | None = None,
    ) -> None:
        self._replica_table = replica_table
        self._observer = observer
        self._reachability = reachability
        self._comes_back = comes_back
        self._writability = writability or Writability()
        self._newest: FeedRead | None = None
        self._fault: str | None = None
        self._next_peers = 0.0  # monotonic
        self._news = asyncio.Event()

    def serves(self, feed_read: FeedRead) -> None:
        """Note the version that all workers serve from now on."""
        changed = self._newest is None or self._newest.position != feed_read.position
        self._newest = feed_read
        if changed:
            self._news.set()

    async def run(self) -> None:
        """Announce until cancelled."""
        backoff = Backoff()
        while True:
            if self._fault is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LONGEST_PAUSE_S):
                        await self._news.wait()
            self._news.clear()
            if self._newest is None:
                continue
            if await self._announced(self._newest):
                backoff.reset()
                await asyncio.sleep(SHORTEST_PAUSE_S)
            else:
                await self._reachability.pause(backoff)

    async def _announced(self, newest: FeedRead) -> bool:
        """Announce once; False if it failed."""
        try:
            await self._replica_table.announce(newest.position, newest.confirmed_at)
            self._writability.succeeded()
            if time.monotonic() >= self._next_peers:
                self._next_peers = time.monotonic() + LONGEST_PAUSE_S
                self._observer.peers(await self._replica_table.peers())
        except AuthbackendError as error:
            if isinstance(error, Unwritable):
                self._writability.failed(error.detail)
            if self._fault != error.detail:
                log.debug("replica.not_announced", fault=error.detail)
            self._fault = error.detail
        except Exception as error:  # a fault of ours must not end the announcements for good
            if self._fault != str(error):
                log.exception("replica.announcement_crashed")
            self._fault = str(error)
        else:
            if self._fault is not None:
                self._reachability.succeeded()
            self._fault = None
            return True
        await self._replica_table.close()
        return False

    async def leave(self) -> None:
        """Sign off, if the database answers soon; call it when no worker answers any more."""
        try:
            async with asyncio.timeout(_LEAVING_S):
                if self._newest is not None:
                    await self._replica_table.sign_off(comes_back=self._comes_back)
        except (AuthbackendError, TimeoutError) as error:
            log.warning("replica.not_signed_off", fault=str(error) or "no answer in time")
        finally:
            await self._replica_table.close()
