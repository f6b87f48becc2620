"""
Actions on one RabbitMQ cluster: find, close and repair, at a limited rate, and never while enforcement is paused.

``Cluster`` is the Protocol that ``management_api`` implements; lanes and the sweep end things only through
``ClusterActions``.
"""

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
"""Up to this many users or client ids are looked up by name; for more, everything is listed."""

_CATCH_UP_S = 1.0
"""Unused turns may be caught up for this long."""


class Cluster(Protocol):
    """
    The calls to one RabbitMQ cluster; implemented in ``management_api``.

    Every method raises ``ClusterUnreachable`` when no node answers, and ``CallRefused`` when one answers with an error.
    """

    name: str

    async def aclose(self) -> None:
        """Close the HTTP connections to the cluster."""

    async def nodes(self) -> dict[str, bool]:
        """Return the cluster's nodes, and whether the node that answered sees each of them running."""

    async def connections_of(self, user: str) -> list[Connection]:
        """Return a user's live connections, without the delay of the statistics."""

    async def close_user(self, user: str) -> None:
        """Close every connection of a user, on every node."""

    async def details(self, name: str) -> LiveConnection | None:
        """Return a connection as the statistics have it; None if they do not have it, or not yet."""

    async def close_connection(self, name: str) -> bool:
        """Close one connection; return False if it is gone, or not in the statistics yet."""

    def connections(self) -> AsyncIterator[list[LiveConnection]]:
        """Yield all connections, in parts; those opened in the last seconds may be missing."""

    def queues(self, pattern: str | None = None) -> AsyncIterator[list[Queue]]:
        """Yield the queues whose name matches a regular expression, or all queues, in parts."""

    async def bindings(self, queue: Queue) -> list[Binding]:
        """Return a queue's bindings, except to the default exchange; none if the queue is gone."""

    def all_bindings(self, vhost: str) -> AsyncIterator[list[tuple[str, Binding]]]:
        """Yield the bindings of all queues of a virtual host, each with its queue's name, in parts."""

    async def unbind(self, queue: Queue, binding: Binding) -> None:
        """Remove a binding; it is not an error if it is gone already."""

    async def is_empty(self, queue: Queue) -> bool:
        """Ask the queue itself whether it is empty; the counts in the statistics are late."""

    async def delete_queue(self, queue: Queue) -> None:
        """Delete a queue with its messages; it is not an error if it is gone already."""


class Pace:
    """
    A rate limit that spaces actions evenly.

    Args:
        per_second: Above 0; None for no limit.
    """

    def __init__(self, per_second: float | None) -> None:
        self._interval_s = 1 / per_second if per_second else 0.0
        self._next = 0.0

    async def wait_for_turn(self) -> None:
        """Wait until the next action is due."""
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
    What was done for one plan in one look; goes into the receipt.

    Args:
        closed: Connections closed, by node.
        deleted: Queues deleted, each with the reason and the number of messages lost.
        unbound: Subscriptions removed from sessions that stay.
        kept: Sessions that were inspected and left as they are.
        not_listed_yet: Connections that the statistics do not have yet, so that they could not be inspected.
        undecided: Connections that stay because the broker reports too little to decide.
    """

    closed: Counter[str] = field(default_factory=Counter)
    deleted: list[dict[str, Any]] = field(default_factory=list)
    unbound: list[dict[str, Any]] = field(default_factory=list)
    kept: int = 0
    not_listed_yet: int = 0
    undecided: int = 0

    @property
    def ended_anything(self) -> bool:
        """Whether anything was closed, deleted or removed."""
        return bool(self.closed or self.deleted or self.unbound)


@dataclass(frozen=True, slots=True)
class Violation:
    """
    A session that the registry does not allow, or not entirely.

    Args:
        why: Why the whole queue must be deleted; None if only bindings must go.
        bindings: The subscriptions that are not allowed, each with the reason.
    """

    session: SessionQueue
    why: str | None
    bindings: tuple[tuple[Binding, str], ...] = ()


class Paused(Exception):
    """Nothing was ended, because enforcement is paused."""


async def _never() -> bool:
    return False


class ClusterActions:
    """
    Actions on one cluster for one lane or for the sweep.

    Every method that closes or deletes something raises :class:`Paused` instead while the lane is paused.

    Args:
        cluster: Not shared with another lane, so that no lane waits for another's calls.
        per_second: How many closing calls are made per second; None for no limit.
        concurrency: How many calls to the management API may be in progress at the same time.
        paused: Returns whether the lane is paused; called before anything is ended.
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
        self._slots = asyncio.Semaphore(concurrency)

    @property
    def name(self) -> str:
        """Name of the cluster."""
        return self.cluster.name

    async def close_user(self, user: str, permitted: Callable[[], bool]) -> list[Connection]:
        """
        Close all connections of a user and return them.

        Args:
            permitted: Called right before they are closed; if it returns True, they stay.
        """
        async with self._slots:
            await self._require_running()
            connections = await self.cluster.connections_of(user)
            if not connections:
                return []
            await self._wait_for_turn()
            if permitted():
                return []
            await self.cluster.close_user(user)
            return connections

    async def close_listed(
        self, connections: list[Connection], permitted: Callable[[], bool], actions: Actions
    ) -> None:
        """
        Close the connections of a list, with one call each; count those that still existed in ``actions``.

        Args:
            permitted: Called right before each is closed; if it returns True, that connection stays.
        """
        for connection in connections:
            async with self._slots:
                await self._wait_for_turn()
                if not permitted() and await self.cluster.close_connection(connection.name):
                    actions.closed[connection.node] += 1

    async def close_where(
        self, user: str, condition: Callable[[LiveConnection], bool | None], actions: Actions
    ) -> None:
        """
        Close those of a user's connections that meet a condition; count them, and the undecided ones, in ``actions``.

        Args:
            condition: Returns None if the broker reports too little to decide.
        """
        async with self._slots:
            await self._require_running()
            for connection in await self.cluster.connections_of(user):
                details = await self.cluster.details(connection.name)
                if details is None:
                    actions.not_listed_yet += 1
                    continue
                must_close = condition(details)
                if must_close is None:
                    actions.undecided += 1
                elif must_close and await self._close(connection.name):
                    actions.closed[connection.node] += 1

    async def close_connection(self, name: str) -> bool:
        """Close one connection, within the rate limit; return False if it is gone already."""
        async with self._slots:
            return await self._close(name)

    async def _close(self, name: str) -> bool:
        await self._wait_for_turn()
        return await self.cluster.close_connection(name)

    async def _wait_for_turn(self) -> None:
        await self._require_running()  # a lane that is already paused does not wait first
        await self._pace.wait_for_turn()
        await self._require_running()  # a pause may have begun during the wait

    async def _require_running(self) -> None:
        if await self._paused():
            raise Paused

    async def sessions(self, owners: list[str] | None = None) -> list[SessionQueue]:
        """Return the session queues whose client id begins with one of these names; all for None or too many names."""
        pattern = None
        if owners is not None and len(owners) <= FEW:
            pattern = f"{SESSION_QUEUES}({'|'.join(map(_escaped, owners))})"
        sessions: list[SessionQueue] = []
        async for page in self.cluster.queues(pattern):
            sessions += [session for queue in page if (session := session_queue(queue)) is not None]
        return sessions

    async def bindings(self, session: SessionQueue) -> list[Binding]:
        """Return the bindings of one session's queue."""
        async with self._slots:
            return await self.cluster.bindings(session.queue)

    async def bindings_of_all(self, sessions: list[SessionQueue]) -> dict[tuple[str, str], list[Binding]]:
        """Return the bindings of many sessions, by virtual host and queue, with one call per virtual host."""
        bindings: dict[tuple[str, str], list[Binding]] = {(s.queue.vhost, s.queue.name): [] for s in sessions}
        for vhost in sorted({vhost for vhost, _ in bindings}):
            async for part in self.cluster.all_bindings(vhost):
                for queue, binding in part:
                    if (vhost, queue) in bindings:
                        bindings[vhost, queue].append(binding)
        return bindings

    async def repair_session(self, violation: Violation, actions: Actions) -> None:
        """
        Delete a session's queue, or remove the bindings that are not allowed; record which in ``actions``.

        If messages wait in the queue, it is deleted even if only a binding must go: nothing says by which binding each
        message came.
        """
        queue, cluster = violation.session.queue, self.cluster
        where = {"cluster": cluster.name, "vhost": queue.vhost, "queue": queue.name}
        why = violation.why
        async with self._slots:
            await self._require_running()
            if why is None:
                for binding, reason in violation.bindings:
                    await cluster.unbind(queue, binding)
                    actions.unbound.append({**where, "filter": binding.routing_key, "why": reason})
                if await cluster.is_empty(queue):
                    return
                why = f"{violation.bindings[0][1]}: its messages cannot be told apart from those of other subscriptions"
            await cluster.delete_queue(queue)
            actions.deleted.append({**where, "messages": queue.messages, "why": why})


def inspect_session(checker: Checker, session: SessionQueue, bindings: list[Binding]) -> Violation | None:
    """Return what the registry does not allow about a session, or None."""
    if why := checker.session(session):
        return Violation(session, str(why))
    forbidden = tuple((each, str(reason)) for each in bindings if (reason := checker.binding(session, each)))
    return Violation(session, None, forbidden) if forbidden else None


def _escaped(text: str) -> str:
    """Escape a text for RabbitMQ's regular expressions (PCRE)."""
    return "".join(each if each.isalnum() or each in "_-" else f"\\x{{{ord(each):x}}}" for each in text)
