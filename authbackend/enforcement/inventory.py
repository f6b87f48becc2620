"""
What is connected to and stored on one cluster, for a batch: asked by name for a few tasks, listed whole for many.

Reads through ``ClusterActions``; ends nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Protocol

from authbackend.enforcement.checks import SessionQueue
from authbackend.enforcement.clusters import ClusterActions
from authbackend.enforcement.management_api import Binding, Connection

STATISTICS_LATE_S = 6.0
"""How late RabbitMQ's statistics, and so its list of all connections, may be."""

LOOK_AGAIN_S = 2.0
"""The delay before another look: a login that was allowed before the change may take this long to be a connection."""


class Inventory(Protocol):
    """
    The connections and sessions of a cluster.

    Args:
        look_again_s: Seconds until the next look: long enough that it sees every login allowed before the first one.
        lists_everything: Whether :meth:`sessions` returns those of all owners, whomever it is asked for.
    """

    look_again_s: float
    lists_everything: bool

    def look_again_for_absent_s(self) -> float:
        """Return after how many seconds a look sees logins that were allowed before and are missing in this one."""

    async def connected(self, users: Iterable[str]) -> set[str]:
        """Return those users that may be connected."""

    def listed(self, user: str) -> list[Connection] | None:
        """Return a user's connections; None if only the cluster knows them."""

    async def sessions(self, owners: list[str]) -> list[SessionQueue]:
        """Return the session queues that may belong to these device ids and client ids, and perhaps others."""

    async def bindings(self, session: SessionQueue) -> list[Binding]:
        """Return the bindings of a session's queue."""


class ByNameInventory:
    """Asks the cluster for each user and each session by name. Not affected by late statistics."""

    look_again_s = LOOK_AGAIN_S
    lists_everything = False

    def __init__(self, actions: ClusterActions) -> None:
        self._actions = actions

    def look_again_for_absent_s(self) -> float:
        """Return the usual delay: no statistics are involved."""
        return self.look_again_s

    async def connected(self, users: Iterable[str]) -> set[str]:
        """Return all of them: the cluster is asked about each when its connections are closed."""
        return set(users)

    def listed(self, user: str) -> None:
        """Return None: the cluster is asked about each user."""

    async def sessions(self, owners: list[str]) -> list[SessionQueue]:
        """Return the session queues whose client id begins with one of these names."""
        return await self._actions.sessions(owners) if owners else []

    async def bindings(self, session: SessionQueue) -> list[Binding]:
        """Return the bindings of a session's queue."""
        return await self._actions.bindings(session)


class ListedInventory:
    """
    Lists everything once, for any number of tasks. Each list is requested when it is first needed.

    Args:
        nodes: The cluster's nodes, and whether each was seen running just before.
    Attributes:
        taken_at: When this was created, on the monotonic clock; no list was requested earlier.
    """

    look_again_s = STATISTICS_LATE_S
    lists_everything = True

    def __init__(self, actions: ClusterActions, nodes: dict[str, bool]) -> None:
        self.nodes = nodes
        self._actions = actions
        self._by_user: dict[str, list[Connection]] | None = None
        self._sessions: list[SessionQueue] | None = None
        self._bindings: dict[tuple[str, str], list[Binding]] | None = None
        self._bindings_lock = asyncio.Lock()  # sessions are repaired concurrently; only the first lists
        self.taken_at = time.monotonic()

    def look_again_for_absent_s(self) -> float:
        """
        Return the rest of the delay, which counts from the creation of this inventory.

        The longer closing the listed connections took, the sooner the next look may be.
        """
        due = self.taken_at + LOOK_AGAIN_S + STATISTICS_LATE_S
        return min(self.look_again_s, max(0.0, due - time.monotonic()))

    async def connections_by_user(self) -> dict[str, list[Connection]]:
        """Return all connections."""
        if self._by_user is None:
            by_user: dict[str, list[Connection]] = {}
            async for part in self._actions.cluster.connections():
                for each in part:
                    by_user.setdefault(each.user, []).append(Connection(each.name, each.node, each.user))
            self._by_user = by_user
        return self._by_user

    async def connected(self, users: Iterable[str]) -> set[str]:
        """Return those users that are in the list of connections."""
        by_user = await self.connections_by_user()
        return {user for user in users if user in by_user}

    def listed(self, user: str) -> list[Connection]:
        """Return a user's connections in the list; call :meth:`connected` first."""
        return (self._by_user or {}).get(user, [])

    async def sessions(self, owners: list[str]) -> list[SessionQueue]:
        """Return all session queues."""
        del owners
        if self._sessions is None:
            self._sessions = await self._actions.sessions()
            await asyncio.sleep(0)
        return self._sessions

    async def bindings(self, session: SessionQueue) -> list[Binding]:
        """Return the bindings of a session's queue."""
        async with self._bindings_lock:
            if self._bindings is None:
                self._bindings = await self._actions.bindings_of_all(self._sessions or [])
        return self._bindings.get((session.queue.vhost, session.queue.name), [])
