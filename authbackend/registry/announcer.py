"""Announces in the database which version this replica serves, and reads the state of the other replicas."""

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
_SIGN_OFF_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Peers:
    """
    The replicas listed in the database.

    Args:
        states: The number that are ``live``, ``silent`` and ``stopped``.
        ages_s: How long ago each was up to date, by name and by the database's clock; the longest if names are equal.
        twins: The number that share their folder with another running replica.
    """

    states: dict[str, int]
    ages_s: dict[str, float]
    twins: int = 0


class ReplicaTable(Protocol):
    """Access to this replica's row in the database; implemented in ``postgres.replicas``."""

    async def announce(self, position: FeedPosition, confirmed_at: datetime) -> None:
        """Record the version that this replica serves."""

    async def sign_off(self, *, comes_back: bool) -> None:
        """Record that this replica stops."""

    async def peers(self) -> Peers:
        """Return the state of all replicas."""

    async def close(self) -> None:
        """Close the connection."""


class AnnouncerObserver(Protocol):
    """Receives the state of all replicas, for metrics."""

    def peers(self, peers: Peers) -> None:
        """Accept the latest state of the replicas."""


class ReplicaAnnouncer:
    """
    Announces the newest version, between once and fifty times a second.

    Database errors are logged at debug level only: the follower sees and reports them too, and the other replicas then
    assume that this one may still serve its last version. Errors that only a writer sees go to ``writability``.

    Args:
        comes_back: Whether this replica can restart without the database, from a copy on disk.
        reachability: Shared by everything in this process that needs the database.
        writability: Records whether the announcement could be written.
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
        self._version_changed = asyncio.Event()

    def serves(self, feed_read: FeedRead) -> None:
        """Set the version that all workers serve from now on."""
        changed = self._newest is None or self._newest.position != feed_read.position
        self._newest = feed_read
        if changed:
            self._version_changed.set()

    async def run(self) -> None:
        """Announce until cancelled."""
        backoff = Backoff()
        while True:
            if self._fault is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LONGEST_PAUSE_S):
                        await self._version_changed.wait()
            self._version_changed.clear()
            if self._newest is None:
                continue
            if await self._announce(self._newest):
                backoff.reset()
                await asyncio.sleep(SHORTEST_PAUSE_S)
            else:
                await self._reachability.pause(backoff)

    async def _announce(self, newest: FeedRead) -> bool:
        """Announce once; return False if that failed."""
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
        except Exception as error:  # a bug in authbackend must not end the announcements for good
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
        """Sign off, unless the database takes too long; call it after all workers have stopped answering."""
        try:
            async with asyncio.timeout(_SIGN_OFF_TIMEOUT_S):
                if self._newest is not None:
                    await self._replica_table.sign_off(comes_back=self._comes_back)
        except (AuthbackendError, TimeoutError) as error:
            log.warning("replica.not_signed_off", fault=str(error) or "no answer in time")
        finally:
            await self._replica_table.close()
