"""
A RabbitMQ cluster in memory, to inject faults and races that a real one cannot be forced into.

It passes the same behaviour suite as a real cluster: tests/support/cluster_behaviour.py.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from authbackend.enforcement.management_api import (
    Binding,
    CallRefused,
    ClusterUnreachable,
    Connection,
    LiveConnection,
    Queue,
)


@dataclass
class Broker:
    """
    The state of one cluster, shared by all its clients.

    Attributes:
        down: Whether no node answers.
        refuses: Returns whether a call, given its method's name and argument, is answered with an error.
        gates: Events that calls wait for, by method name.
        calls: Every call with its argument, in order.
        statistics: Whether new connections are listed immediately; if not, they are in ``tracked_only``.
        live: Connections by name.
        tracked_only: Names of connections that the statistics do not have yet.
        bound: Bindings by key, for each queue.
        running: The nodes, and whether each is running.
        closed: The user of each connection that was closed, in order.
    """

    name: str = "rabbit"
    down: bool = False
    refuses: Callable[[str, str], bool] = lambda _method, _argument: False
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    calls: list[tuple[str, str]] = field(default_factory=list)
    statistics: bool = True
    live: dict[str, LiveConnection] = field(default_factory=dict)
    tracked_only: set[str] = field(default_factory=set)
    queues: dict[tuple[str, str], Queue] = field(default_factory=dict)
    bound: dict[tuple[str, str], dict[str, Binding]] = field(default_factory=dict)
    running: dict[str, bool] = field(default_factory=lambda: {"rabbit@one": True})
    closed: list[str] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def connect(
        self, user: str, client_id: str | None = "", *filters: str, stored: bool = False, **facts: object
    ) -> str:
        """
        Connect a device, subscribe it to filters, and return the connection's name.

        Args:
            client_id: That of the user's name if empty; None for a protocol without client ids.
            stored: Whether to create a session queue even without filters.
            facts: Other fields of the ``LiveConnection``.
        """
        name = f"127.0.0.1:{next(self._numbers)} -> 127.0.0.1:8883"
        client_id = user if client_id == "" else client_id
        values: dict[str, object] = {
            "name": name,
            "node": "rabbit@one",
            "user": user,
            "vhost": "/",
            "protocol": "MQTT 5-0",
            "address": "127.0.0.1",
            "client_id": client_id,
            "certificate_subject": None,
            "certificate_serial": None,
            "user_properties": {},
            "connected_at": time.time(),
        }
        self.live[name] = LiveConnection(**{**values, **facts})  # type: ignore[arg-type]
        if not self.statistics:
            self.tracked_only.add(name)
        if client_id and (filters or stored):
            self.subscribe(client_id, *filters)
        return name

    def subscribe(self, client_id: str, *filters: str, messages: int = 0) -> None:
        """Create a session queue with bindings and waiting messages."""
        queue = Queue("/", f"mqtt-subscription-{client_id}qos1", messages)
        self.queues[queue.vhost, queue.name] = queue
        for each in filters:
            key = each.replace("/", ".").replace("+", "*")
            self.bound.setdefault((queue.vhost, queue.name), {})[key] = Binding("amq.topic", key, key)

    def users(self) -> list[str]:
        """Return the users of all connections, sorted."""
        return sorted(each.user for each in self.live.values())

    async def until(self, condition: Callable[[], bool], limit_s: float = 20.0) -> None:
        """Wait until a condition holds."""
        async with asyncio.timeout(limit_s):
            while not condition():
                await asyncio.sleep(0.005)


class MemoryCluster:
    """A client of a cluster in memory; implements ``enforcement.clusters.Cluster``."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.name = broker.name

    async def aclose(self) -> None:
        """Do nothing: there is no connection."""

    async def _called(self, method: str, argument: str = "") -> None:
        broker = self.broker
        broker.calls.append((method, argument))
        if gate := broker.gates.get(method):
            await gate.wait()
        await asyncio.sleep(0)
        if broker.down:
            raise ClusterUnreachable(f"the management API of cluster {broker.name} failed: down")
        if broker.refuses(method, argument):
            raise CallRefused(f"the management API of cluster {broker.name} failed: HTTP 500 to {argument}")

    async def nodes(self) -> dict[str, bool]:
        await self._called("nodes")
        return dict(self.broker.running)

    async def connections_of(self, user: str) -> list[Connection]:
        await self._called("connections_of", user)
        return [Connection(c.name, c.node, c.user) for c in self.broker.live.values() if c.user == user]

    async def close_user(self, user: str) -> None:
        await self._called("close_user", user)
        for name in [name for name, each in self.broker.live.items() if each.user == user]:
            self._close(name)

    def _close(self, name: str) -> None:
        self.broker.closed.append(self.broker.live.pop(name).user)
        self.broker.tracked_only.discard(name)

    async def details(self, name: str) -> LiveConnection | None:
        await self._called("details", name)
        return None if name in self.broker.tracked_only else self.broker.live.get(name)

    async def close_connection(self, name: str) -> bool:
        await self._called("close_connection", name)
        if name not in self.broker.live or name in self.broker.tracked_only:
            return False
        self._close(name)
        return True

    async def connections(self) -> AsyncIterator[list[LiveConnection]]:
        await self._called("connections")
        yield [each for name, each in self.broker.live.items() if name not in self.broker.tracked_only]

    async def queues(self, pattern: str | None = None) -> AsyncIterator[list[Queue]]:
        await self._called("queues", pattern or "")
        fits = re.compile(re.sub(r"\\x\{([0-9a-f]+)\}", lambda m: re.escape(chr(int(m[1], 16))), pattern or ""))
        yield [queue for queue in self.broker.queues.values() if fits.search(queue.name)]

    async def bindings(self, queue: Queue) -> list[Binding]:
        await self._called("bindings", queue.name)
        return list(self.broker.bound.get((queue.vhost, queue.name), {}).values())

    async def all_bindings(self, vhost: str) -> AsyncIterator[list[tuple[str, Binding]]]:
        await self._called("all_bindings", vhost)
        yield [
            (name, binding)
            for (where, name), each in self.broker.bound.items()
            if where == vhost
            for binding in each.values()
        ]

    async def unbind(self, queue: Queue, binding: Binding) -> None:
        await self._called("unbind", queue.name)
        self.broker.bound.get((queue.vhost, queue.name), {}).pop(binding.key, None)

    async def is_empty(self, queue: Queue) -> bool:
        await self._called("is_empty", queue.name)
        found = self.broker.queues.get((queue.vhost, queue.name))
        return found is None or found.messages == 0

    async def delete_queue(self, queue: Queue) -> None:
        await self._called("delete_queue", queue.name)
        self.broker.queues.pop((queue.vhost, queue.name), None)
        self.broker.bound.pop((queue.vhost, queue.name), None)
