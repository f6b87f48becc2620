"""All clusters together: ends what a case names, and says what it did."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from authbackend.enforcement.checks import SESSION_QUEUES, Checker, SessionQueue, session_queue
from authbackend.enforcement.management_api import Binding, Cluster, Connection, LiveConnection, Queue

_AT_ONCE = 2
_FEW = 50
"""So many client ids are looked for by name; for more, all session queues are listed."""


class Pace:
    """
    Lets so many through a second, evenly.

    Args:
        per_second: Above 0.
    """

    def __init__(self, per_second: float) -> None:
        self._interval_s = 1 / per_second
        self._next = 0.0

    async def turn(self) -> None:
        """Wait for the next turn."""
        now = time.monotonic()
        due = max(now, self._next)
        self._next = due + self._interval_s
        if due > now:
            await asyncio.sleep(due - now)


@dataclass
class Actions:
    """
    What was done for one task; as JSON it is the receipt.

    Args:
        nodes: Of each cluster, and whether it was seen running.
        closed: Connections closed, by node.
        deleted: Queues deleted, with why, and how many messages went with them.
        unbound: Subscriptions removed from sessions that stay.
        kept: Sessions looked at and left as they are.
        unknown: Connections of which it is not known yet whether they are older than the change.
    """

    nodes: dict[str, dict[str, bool]] = field(default_factory=dict)
    closed: Counter[str] = field(default_factory=Counter)
    deleted: list[dict[str, Any]] = field(default_factory=list)
    unbound: list[dict[str, Any]] = field(default_factory=list)
    kept: int = 0
    unknown: int = 0

    @property
    def anything(self) -> bool:
        """True if something was there to be ended."""
        return bool(self.closed or self.deleted or self.unbound)

    @property
    def unseen(self) -> list[str]:
        """Nodes that were not seen running: what is connected there is not known."""
        return [f"{node} of {cluster}" for cluster, nodes in self.nodes.items() for node, up in nodes.items() if not up]


@dataclass(frozen=True, slots=True)
class Violation:
    """
    A session that is not as it should be.

    Args:
        why: Why the whole queue goes; None: only the bindings.
        bindings: The subscriptions that are not allowed, with why.
    """

    cluster: Cluster
    session: SessionQueue
    why: str | None
    bindings: tuple[tuple[Binding, str], ...] = ()


class Clusters:
    """
    The clusters that a registry decides for. Every method raises ``Unavailable`` when one of them does not answer.

    Args:
        per_second: How many users' connections are closed a second.
    """

    def __init__(self, clusters: Iterable[Cluster], per_second: float) -> None:
        self.clusters = tuple(clusters)
        self._pace = Pace(per_second)
        self._some = asyncio.Semaphore(_AT_ONCE)

    async def close(self) -> None:
        """End the connections to all of them."""
        for cluster in self.clusters:
            await cluster.close()

    async def nodes(self) -> dict[str, dict[str, bool]]:
        """Return the nodes of each cluster, and which are seen running."""
        return {cluster.name: await cluster.nodes() for cluster in self.clusters}

    async def connections_of(self, users: Iterable[str]) -> list[tuple[Cluster, Connection]]:
        """Return the live connections of users."""

        async def one(cluster: Cluster, user: str) -> list[tuple[Cluster, Connection]]:
            async with self._some:
                return [(cluster, each) for each in await cluster.connections_of(user)]

        pairs = [(cluster, user) for user in users for cluster in self.clusters]
        found = await asyncio.gather(*(one(*pair) for pair in pairs))
        return [each for part in found for each in part]

    async def connections(self) -> list[tuple[Cluster, LiveConnection]]:
        """Return all live connections; those of the last seconds may be missing."""
        return [(c, each) for c in self.clusters async for page in c.connections() for each in page]

    async def close_users(self, found: list[tuple[Cluster, Connection]]) -> list[Connection]:
        """Close all connections of the users of these, and return them."""

        async def one(cluster: Cluster, user: str) -> None:
            async with self._some:
                await self._pace.turn()
                await cluster.close_user(user)

        await asyncio.gather(*(one(cluster, user) for cluster, user in dict.fromkeys((c, x.user) for c, x in found)))
        return [connection for _, connection in found]

    async def close_where(
        self, found: list[tuple[Cluster, Connection]], condition: Callable[[LiveConnection], bool]
    ) -> tuple[list[Connection], list[Connection]]:
        """
        Close those of these connections that meet a condition.

        Returns:
            Those that were closed, and those that the statistics do not have yet, so that it cannot be told.
        """
        closed, unknown = [], []

        async def one(cluster: Cluster, connection: Connection) -> None:
            async with self._some:
                details = await cluster.details(connection.name)
                if details is None:
                    unknown.append(connection)
                elif condition(details):
                    await self.close_one(cluster, connection)
                    closed.append(connection)

        await asyncio.gather(*(one(*pair) for pair in found))
        return closed, unknown

    async def sessions(self, owners: list[str]) -> list[tuple[Cluster, SessionQueue]]:
        """
        Return the session queues whose client id begins with one of these device ids or client ids.

        Args:
            owners: Empty for all sessions.
        """
        pattern = None
        if 0 < len(owners) <= _FEW:
            pattern = f"{SESSION_QUEUES}({'|'.join(map(_escaped, owners))})"
        return [(c, session) for c in self.clusters for session in await self.sessions_of(c, pattern)]

    async def sessions_of(self, cluster: Cluster, pattern: str | None = None) -> list[SessionQueue]:
        """Return the session queues of one cluster."""
        pages = [page async for page in cluster.queues(pattern)]
        return [session for page in pages for queue in page if (session := session_queue(queue)) is not None]

    async def close_one(self, cluster: Cluster, connection: Connection) -> None:
        """Close one connection, at the common pace."""
        await self._pace.turn()
        await cluster.close_connection(connection.name)

    async def bindings(self, sessions: list[tuple[Cluster, SessionQueue]]) -> list[list[Binding]]:
        """Return the bindings of each session's queue."""

        async def one(cluster: Cluster, queue: Queue) -> list[Binding]:
            async with self._some:
                return await cluster.bindings(queue)

        return await asyncio.gather(*(one(cluster, session.queue) for cluster, session in sessions))

    async def repair_session(self, finding: Violation, done: Actions) -> None:
        """Delete a session's queue, or remove the bindings that are not allowed; whichever it is goes into ``done``."""
        queue, cluster = finding.session.queue, finding.cluster
        where = {"cluster": cluster.name, "vhost": queue.vhost, "queue": queue.name}
        why = finding.why
        if why is None:
            for binding, reason in finding.bindings:
                await cluster.unbind(queue, binding)
                done.unbound.append({**where, "filter": binding.routing_key, "why": reason})
            if await cluster.is_empty(queue):
                return
            why = f"{finding.bindings[0][1]}: its messages cannot be told from those of other subscriptions"
        await cluster.delete_queue(queue)
        done.deleted.append({**where, "messages": queue.messages, "why": why})


def inspect_session(
    checker: Checker, cluster: Cluster, session: SessionQueue, bindings: list[Binding]
) -> Violation | None:
    """Return what is wrong with a session, None if nothing is."""
    if why := checker.session(session):
        return Violation(cluster, session, str(why))
    faults = tuple((each, str(reason)) for each in bindings if (reason := checker.binding(session, each)))
    return Violation(cluster, session, None, faults) if faults else None


def _escaped(text: str) -> str:
    """Escape a text for RabbitMQ's regular expressions (PCRE)."""
    return "".join(each if each.isalnum() or each in "_-" else f"\\x{{{ord(each):x}}}" for each in text)
