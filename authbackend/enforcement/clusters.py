"""One cluster as a lane sees it: finds what is connected and stored, and ends it at the set pace."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from authbackend.enforcement.checks import SESSION_QUEUES, Checker, SessionQueue, session_queue
from authbackend.enforcement.management_api import Binding, Connection, LiveConnection, Queue

FEW = 50
"""Up to so many users or client ids are looked for by name; for more, everything is listed."""

_CATCH_UP_S = 1.0


class Cluster(Protocol):
    """
    One RabbitMQ cluster; ``management_api`` has the real one.

    Every method raises ``ClusterUnreachable`` when no node of it answers, and ``CallRefused`` when one answers with an
    error.
    """

    name: str

    async def aclose(self) -> None:
        """End the connections to it."""

    async def nodes(self) -> dict[str, bool]:
        """Return the cluster's nodes and whether the one that answered sees each of them running."""

    async def connections_of(self, user: str) -> list[Connection]:
        """Return a user's live connections, true at once."""

    async def close_user(self, user: str) -> None:
        """Close every connection of a user, on every node."""

    async def details(self, name: str) -> LiveConnection | None:
        """Return what the statistics know of a connection; None if they do not have it, or not yet."""

    async def close_connection(self, name: str) -> bool:
        """Close one connection; return False if it is gone, or not in the statistics yet."""

    def connections(self) -> AsyncIterator[list[LiveConnection]]:
        """Yield all connections in parts; those of the last seconds may be missing."""

    def queues(self, pattern: str | None = None) -> AsyncIterator[list[Queue]]:
        """Yield the queues whose name matches a regular expression, or all, in parts."""

    async def bindings(self, queue: Queue) -> list[Binding]:
        """Return what is bound to a queue, but for the default exchange; none if the queue is gone."""

    def all_bindings(self, vhost: str) -> AsyncIterator[list[tuple[str, Binding]]]:
        """Yield the bindings of all queues of a virtual host, each with the queue's name, in parts."""

    async def unbind(self, queue: Queue, binding: Binding) -> None:
        """Remove a binding; one that is gone is no error."""

    async def is_empty(self, queue: Queue) -> bool:
        """Return whether a queue holds no message, asked of the queue itself."""

    async def delete_queue(self, queue: Queue) -> None:
        """Delete a queue with its messages; one that is gone is no error."""


class Pace:
    """
    Lets so many through a second, evenly; what was missed in the last second is caught up with.

    Args:
        per_second: Above 0; None: no limit.
    """

    def __init__(self, per_second: float | None) -> None:
        self._interval_s = 1 / per_second if per_second else 0.0
        self._next = 0.0

    async def turn(self) -> None:
        """Wait for the next turn."""
        if not self._interval_s:
            return
        now = time.monotonic()
        due = max(now - _CATCH_UP_S, self._next)
        self._next = due + self._interval_s
        if due > now:
            await asyncio.sleep(due - now)


@dataclass
class Actions:
    """
    What was done for one task; as JSON it is the receipt.

    Args:
        closed: Connections closed, by node.
        deleted: Queues deleted, with why, and how many messages went with them.
        unbound: Subscriptions removed from sessions that stay.
        kept: Sessions looked at and left as they are.
        late: Connections that the statistics do not have yet, so that nothing is known of them.
        untold: Connections that stay because the broker does not tell what would decide about them.
    """

    closed: Counter[str] = field(default_factory=Counter)
    deleted: list[dict[str, Any]] = field(default_factory=list)
    unbound: list[dict[str, Any]] = field(default_factory=list)
    kept: int = 0
    late: int = 0
    untold: int = 0

    @property
    def anything(self) -> bool:
        """True if something was there to be ended."""
        return bool(self.closed or self.deleted or self.unbound)


@dataclass(frozen=True, slots=True)
class Violation:
    """
    A session that is not as it should be.

    Args:
        why: Why the whole queue goes; None: only the bindings.
        bindings: The subscriptions that are not allowed, with why.
    """

    session: SessionQueue
    why: str | None
    bindings: tuple[tuple[Binding, str], ...] = ()


class Paused(Exception):
    """Nothing more is ended: enforcement was paused meanwhile."""


async def _never() -> bool:
    return False


class ClusterActions:
    """
    Acts on one cluster for one lane. Whatever ends something raises :class:`Paused` instead while the lane is paused.

    Args:
        cluster: Not shared with another lane, so that nothing waits for another lane's calls.
        per_second: How many users' connections are closed a second; None: as fast as it goes.
        concurrency: How many calls to the management API are under way at a time.
        paused: Whether the lane is paused; asked before anything is ended.
    """

    def __init__(
        self,
        cluster: Cluster,
        per_second: float | None,
        concurrency: int,
        paused: Callable[[], Awaitable[bool]] = _never,
    ) -> None:
        self.cluster = cluster
        self._pace = Pace(per_second)
        self._paused = paused
        self.slots = asyncio.Semaphore(concurrency)

    @property
    def name(self) -> str:
        """Name of the cluster."""
        return self.cluster.name

    async def close_user(self, user: str, permitted: Callable[[], bool]) -> list[Connection]:
        """
        Close all connections of a user and return those that were there.

        Args:
            permitted: Asked right before they are closed; if it returns true by then, nothing is.
        """
        async with self.slots:
            await self._require_running()
            found = await self.cluster.connections_of(user)
            if not found:
                return []
            await self._turn()
            if permitted():
                return []
            await self.cluster.close_user(user)
            return found

    async def close_listed(self, connections: list[Connection], permitted: Callable[[], bool], done: Actions) -> None:
        """
        Close connections that are in a list, one call for each; ``done`` says where those were that were still there.

        Args:
            permitted: Asked right before each is closed; if it returns true by then, it is not.
        """
        for connection in connections:
            async with self.slots:
                await self._turn()
                if not permitted() and await self.cluster.close_connection(connection.name):
                    done.closed[connection.node] += 1

    async def close_where(self, user: str, condition: Callable[[LiveConnection], bool | None], done: Actions) -> None:
        """
        Close those of a user's connections that meet a condition; ``done`` says where, and of which nothing is known.

        Args:
            condition: Returns None where the broker does not tell enough.
        """
        async with self.slots:
            await self._require_running()
            for connection in await self.cluster.connections_of(user):
                details = await self.cluster.details(connection.name)
                meets = None if details is None else condition(details)
                if details is None:
                    done.late += 1
                elif meets is None:
                    done.untold += 1
                elif meets and await self._close(connection.name):
                    done.closed[connection.node] += 1

    async def close_connection(self, name: str) -> bool:
        """Close one connection, at the set pace; return False if it is gone."""
        async with self.slots:
            return await self._close(name)

    async def _close(self, name: str) -> bool:
        await self._turn()
        return await self.cluster.close_connection(name)

    async def _turn(self) -> None:
        await self._require_running()  # who waits for its turn when a pause begins does not wait it out
        await self._pace.turn()
        await self._require_running()

    async def _require_running(self) -> None:
        if await self._paused():
            raise Paused

    async def sessions(self, owners: list[str] | None = None) -> list[SessionQueue]:
        """Return the session queues whose client id begins with one of these names; None: all of them."""
        pattern = None
        if owners is not None and len(owners) <= FEW:
            pattern = f"{SESSION_QUEUES}({'|'.join(map(_escaped, owners))})"
        found: list[SessionQueue] = []
        async for page in self.cluster.queues(pattern):
            found += [session for queue in page if (session := session_queue(queue)) is not None]
        return found

    async def bindings(self, session: SessionQueue) -> list[Binding]:
        """Return the bindings of a session's queue."""
        async with self.slots:
            return await self.cluster.bindings(session.queue)

    async def listed_bindings(self, sessions: list[SessionQueue]) -> dict[tuple[str, str], list[Binding]]:
        """Return the bindings of many sessions, by virtual host and queue, with one list for each virtual host."""
        found: dict[tuple[str, str], list[Binding]] = {(s.queue.vhost, s.queue.name): [] for s in sessions}
        for vhost in sorted({vhost for vhost, _ in found}):
            async for part in self.cluster.all_bindings(vhost):
                for queue, binding in part:
                    if (vhost, queue) in found:
                        found[vhost, queue].append(binding)
        return found

    async def repair_session(self, violation: Violation, actions: Actions) -> None:
        """Delete a session's queue, or remove the bindings that are not allowed; ``actions`` says which."""
        queue, cluster = violation.session.queue, self.cluster
        where = {"cluster": cluster.name, "vhost": queue.vhost, "queue": queue.name}
        why = violation.why
        async with self.slots:
            await self._require_running()
            if why is None:
                for binding, reason in violation.bindings:
                    await cluster.unbind(queue, binding)
                    actions.unbound.append({**where, "filter": binding.routing_key, "why": reason})
                if await cluster.is_empty(queue):
                    return
                why = f"{violation.bindings[0][1]}: its messages cannot be told from those of other subscriptions"
            await cluster.delete_queue(queue)
            actions.deleted.append({**where, "messages": queue.messages, "why": why})


def inspect_session(checker: Checker, session: SessionQueue, bindings: list[Binding]) -> Violation | None:
    """Return what is wrong with a session, None if nothing is."""
    if why := checker.session(session):
        return Violation(session, str(why))
    faults = tuple((each, str(reason)) for each in bindings if (reason := checker.binding(session, each)))
    return Violation(session, None, faults) if faults else None


def _escaped(text: str) -> str:
    """Escape a text for RabbitMQ's regular expressions (PCRE)."""
    return "".join(each if each.isalnum() or each in "_-" else f"\\x{{{ord(each):x}}}" for each in text)
