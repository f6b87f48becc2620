"""
The behaviour of a cluster that enforcement relies on, as tests for the real cluster and for the one in memory.

A test module provides a fixture ``environment`` and imports these tests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import pytest

from authbackend.enforcement.checks import SESSION_QUEUES
from authbackend.enforcement.clusters import Cluster, ClusterActions
from authbackend.enforcement.management_api import Binding, ClusterUnreachable, Connection, LiveConnection, Queue

T = TypeVar("T")


class Environment(Protocol):
    """
    A cluster, and devices that connect to it.

    Attributes:
        cluster: The cluster under test.
        silent: Another cluster, of which no node answers.
        user, other: Names of devices, which are also their client ids.
    """

    cluster: Cluster
    silent: Cluster
    user: str
    other: str

    async def connect(self, user: str, *filters: str) -> None:
        """Connect a device with a stored session, and subscribe."""

    async def queue_message(self, user: str, topic: str) -> None:
        """Queue a message in the session of a device that has disconnected."""


async def eventually(look: Callable[[], Awaitable[T]], limit_s: float = 15.0) -> T:
    """Call repeatedly until the result is true; the statistics of a real broker are late."""
    async with asyncio.timeout(limit_s):
        while not (found := await look()):
            await asyncio.sleep(0.1)
    return found


def session(user: str) -> Queue:
    return Queue("/", f"mqtt-subscription-{user}qos1", 0)


async def listed(environment: Environment) -> dict[str, LiveConnection]:
    return {each.user: each async for part in environment.cluster.connections() for each in part}


async def test_the_nodes_are_told_with_whether_they_run(environment: Environment) -> None:
    nodes = await environment.cluster.nodes()
    assert nodes
    assert all(nodes.values())


async def test_a_users_connections_are_known_at_once(environment: Environment) -> None:
    await environment.connect(environment.user)
    (found,) = await environment.cluster.connections_of(environment.user)
    assert found.user == environment.user
    assert found.node in await environment.cluster.nodes()
    assert await environment.cluster.connections_of("nobody") == []


async def test_closing_a_user_closes_nobody_else(environment: Environment) -> None:
    await environment.connect(environment.user)
    await environment.connect(environment.other)
    await environment.cluster.close_user(environment.user)

    async def gone() -> bool:
        return await environment.cluster.connections_of(environment.user) == []

    await eventually(gone)
    assert len(await environment.cluster.connections_of(environment.other)) == 1
    await environment.cluster.close_user(environment.user)
    await environment.cluster.close_user("nobody")


async def test_the_list_of_all_tells_what_a_connection_is(environment: Environment) -> None:
    await environment.connect(environment.user)

    async def mine() -> LiveConnection | None:
        return (await listed(environment)).get(environment.user)

    found = await eventually(mine)
    assert found is not None
    assert (found.user, found.vhost, found.client_id) == (environment.user, "/", environment.user)
    assert found.protocol.startswith("MQTT")
    assert found.connected_at > 1.6e9
    assert await environment.cluster.details(found.name) == found
    assert await environment.cluster.details("no such connection") is None


async def test_one_connection_is_closed_and_one_that_is_gone_is_no_error(environment: Environment) -> None:
    await environment.connect(environment.user)
    await environment.connect(environment.other)
    (found,) = await environment.cluster.connections_of(environment.user)

    async def known() -> LiveConnection | None:
        return await environment.cluster.details(found.name)

    await eventually(known)
    assert await environment.cluster.close_connection(found.name)

    async def gone() -> bool:
        return await environment.cluster.connections_of(environment.user) == []

    await eventually(gone)

    async def known_no_more() -> bool:
        return not await environment.cluster.close_connection(found.name)

    await eventually(known_no_more)
    assert len(await environment.cluster.connections_of(environment.other)) == 1


async def test_queues_are_found_by_name_and_in_the_list_of_all(environment: Environment) -> None:
    await environment.connect(environment.user, f"fleet/{environment.user}/commands/#")
    await environment.connect(environment.other, f"fleet/{environment.other}/commands/#")

    async def names(pattern: str | None) -> set[str]:
        return {queue.name async for part in environment.cluster.queues(pattern) for queue in part}

    mine, others = session(environment.user).name, session(environment.other).name
    assert await names(f"{SESSION_QUEUES}({environment.user})") == {mine}
    assert {mine, others} <= await names(None)
    assert await names(f"{SESSION_QUEUES}(nobody)") == set()
    actions = ClusterActions(environment.cluster, None, 1)
    assert {each.client_id for each in await actions.sessions([environment.user])} == {environment.user}
    assert await actions.sessions([f"{environment.user[:-1]}."]) == []  # a dot is a dot


async def test_bindings_of_one_queue_and_of_all(environment: Environment) -> None:
    await environment.connect(
        environment.user, f"fleet/{environment.user}/commands/#", f"fleet/{environment.user}/telemetry/+"
    )
    queue = session(environment.user)
    found = {binding.routing_key: binding for binding in await environment.cluster.bindings(queue)}
    assert set(found) == {f"fleet.{environment.user}.commands.#", f"fleet.{environment.user}.telemetry.*"}
    every = [pair async for part in environment.cluster.all_bindings("/") for pair in part]
    assert {binding.routing_key for name, binding in every if name == queue.name} == set(found)
    await environment.cluster.unbind(queue, found[f"fleet.{environment.user}.telemetry.*"])
    await environment.cluster.unbind(queue, found[f"fleet.{environment.user}.telemetry.*"])
    assert [b.routing_key for b in await environment.cluster.bindings(queue)] == [
        f"fleet.{environment.user}.commands.#"
    ]
    assert await environment.cluster.bindings(session("nobody")) == []


async def test_whether_a_queue_is_empty_and_deleting_it(environment: Environment) -> None:
    await environment.connect(environment.user, f"fleet/{environment.user}/telemetry/#")
    queue = session(environment.user)
    assert await environment.cluster.is_empty(queue)
    await environment.cluster.close_user(environment.user)
    await environment.queue_message(environment.user, f"fleet/{environment.user}/telemetry/x")
    assert not await environment.cluster.is_empty(queue)
    assert not await environment.cluster.is_empty(queue)  # it was put back
    await environment.cluster.delete_queue(queue)
    await environment.cluster.delete_queue(queue)
    assert await environment.cluster.is_empty(queue)
    assert await environment.cluster.bindings(queue) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda cluster: cluster.nodes(),
        lambda cluster: cluster.connections_of("A"),
        lambda cluster: cluster.close_user("A"),
        lambda cluster: cluster.details("A"),
        lambda cluster: cluster.close_connection("A"),
        lambda cluster: _all(cluster.connections()),
        lambda cluster: _all(cluster.queues()),
        lambda cluster: cluster.bindings(session("A")),
        lambda cluster: _all(cluster.all_bindings("/")),
        lambda cluster: cluster.unbind(session("A"), Binding("amq.topic", "x", "x")),
        lambda cluster: cluster.is_empty(session("A")),
        lambda cluster: cluster.delete_queue(session("A")),
    ],
)
async def test_a_cluster_that_does_not_answer_is_named(
    environment: Environment, call: Callable[[Cluster], Awaitable[object]]
) -> None:
    with pytest.raises(ClusterUnreachable, match=f"cluster {environment.silent.name} "):
        await call(environment.silent)


async def _all(parts: object) -> list[Connection]:
    return [each async for part in parts for each in part]  # type: ignore[attr-defined]
