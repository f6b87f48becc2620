"""What is connected to one cluster and stored on it, as far as a batch of tasks needs it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Protocol

from authbackend.enforcement.checks import SessionQueue
from authbackend.enforcement.clusters import ClusterActions
from authbackend.enforcement.management_api import Binding, Connection

STATISTICS_LATE_S = 6.0
"""How stale RabbitMQ's list of all connections may be."""

LOOK_AGAIN_S = 2.0
"""An allow that was given before the change may become a connection a moment after the others were closed."""


class Inventory(Protocol):
    """
    Where a batch looks.

    Args:
        look_again_s: After this time another look sees all that was allowed before the first one.
        lists: Whether everything is listed once, so that sessions need not be asked for in parts.
    """

    look_again_s: float
    lists: bool

    def look_again_for_absent_s(self) -> float:
        """Return in how many seconds another look sees what was allowed before, but was not to be found yet in this one."""

    async def connected(self, users: Iterable[str]) -> set[str]:
        """Return those users that may be connected."""

    def listed(self, user: str) -> list[Connection] | None:
        """Return a user's connections in the list; None: they must be asked for."""

    async def sessions(self, owners: list[str]) -> list[SessionQueue]:
        """Return the session queues that may belong to these device ids and client ids; more may be among them."""

    async def bindings(self, session: SessionQueue) -> list[Binding]:
        """Return the bindings of a session's queue."""


class ByName:
    """Asks for each user and each session by name; exact at once."""

    look_again_s = LOOK_AGAIN_S
    lists = False

    def __init__(self, actions: ClusterActions) -> None:
        self._actions = actions

    def look_again_for_absent_s(self) -> float:
        """Return the same as for what was found: it has just been asked for."""
        return self.look_again_s

    async def connected(self, users: Iterable[str]) -> set[str]:
        """Return all of them: each is asked for when its connections are closed."""
        return set(users)

    def listed(self, user: str) -> None:
        """Each user is asked for."""

    async def sessions(self, owners: list[str]) -> list[SessionQueue]:
        """Return the session queues whose client id begins with one of these names."""
        return await self._actions.sessions(owners) if owners else []

    async def bindings(self, session: SessionQueue) -> list[Binding]:
        """Return the bindings of a session's queue."""
        return await self._actions.bindings(session)


class Listed:
    """
    Asks once for everything, for any number of tasks.

    Args:
        nodes: That were seen running right before.
    Attributes:
        taken_at: when it was begun, by the monotonic clock.
    """

    look_again_s = STATISTICS_LATE_S
    lists = True

    def __init__(self, actions: ClusterActions, nodes: dict[str, bool]) -> None:
        self.nodes = nodes
        self._actions = actions
        self._users: dict[str, list[Connection]] | None = None
        self._sessions: list[SessionQueue] | None = None
        self._bindings: dict[tuple[str, str], list[Binding]] | None = None
        self._listing = asyncio.Lock()
        self.taken_at = time.monotonic()

    def look_again_for_absent_s(self) -> float:
        """Return less the longer it took to close those that were in the list; it counts from when the list was begun."""
        due = self.taken_at + LOOK_AGAIN_S + STATISTICS_LATE_S
        return min(self.look_again_s, max(0.0, due - time.monotonic()))

    async def users(self) -> dict[str, list[Connection]]:
        """Return who is connected, with the connections."""
        if self._users is None:
            found: dict[str, list[Connection]] = {}
            async for part in self._actions.cluster.connections():
                for each in part:
                    found.setdefault(each.user, []).append(Connection(each.name, each.node, each.user))
            self._users = found
        return self._users

    async def connected(self, users: Iterable[str]) -> set[str]:
        """Return those users that are connected."""
        listed = await self.users()
        return {user for user in users if user in listed}

    def listed(self, user: str) -> list[Connection] | None:
        """Return a user's connections in the list, which has been asked for."""
        return (self._users or {}).get(user, [])

    async def sessions(self, owners: list[str]) -> list[SessionQueue]:
        """Return all session queues."""
        del owners  # whoever they are: the list is asked for once
        if self._sessions is None:
            self._sessions = await self._actions.sessions()
            await asyncio.sleep(0)
        return self._sessions

    async def bindings(self, session: SessionQueue) -> list[Binding]:
        """Return the bindings of a session's queue."""
        async with self._listing:
            if self._bindings is None:
                self._bindings = await self._actions.listed_bindings(self._sessions or [])
        return self._bindings.get((session.queue.vhost, session.queue.name), [])
