"""
What enforcement relies on of a cluster, as tests that the real one and the one in memory pass.

A module of tests gives a fixture ``stage`` and imports the tests.
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


class Stage(Protocol):
    """
    A cluster, and devices that connect to it.

    Attributes:
        cluster: that is tested.
        silent: another one, of which no node answers.
        user, other: names of devices, which are their client ids, too.
    """

    cluster: Cluster
    silent: Cluster
    user: str
    other: str

    async def connect(self, user: str, *filters: str) -> None:
        """Connect a device with a session that is stored, and subscribe."""

    async def queue_message(self, user: str, topic: str) -> None:
        """Let a message wait in the session of a device that is not connected any more."""


async def eventually(look: Callable[[], Awaitable[T]], limit_s: float = 15.0) -> T:
    """Look until something is there; the statistics of a real broker are late."""
    async with asyncio.timeout(limit_s):
        while not (found := await look()):
            await asyncio.sleep(0.1)
    return found


def session(user: str) -> Queue:
    return Queue("/", f"mqtt-subscription-{user}qos1", 0)


async def listed(stage: Stage) -> dict[str, LiveConnection]:
    return {each.user: each async for part in stage.cluster.connections() for each in part}


async def test_the_nodes_are_told_with_whether_they_run(stage: Stage) -> None:
    nodes = await stage.cluster.nodes()
    assert nodes
    assert all(nodes.values())


async def test_a_users_connections_are_known_at_once(stage: Stage) -> None:
    await stage.connect(stage.user)
    (found,) = await stage.cluster.connections_of(stage.user)
    assert found.user == stage.user
    assert found.node in await stage.cluster.nodes()
    assert await stage.cluster.connections_of("nobody") == []


async def test_closing_a_user_closes_nobody_else(stage: Stage) -> None:
    await stage.connect(stage.user)
    await stage.connect(stage.other)
    await stage.cluster.close_user(stage.user)

    async def gone() -> bool:
        return await stage.cluster.connections_of(stage.user) == []

    await eventually(gone)
    assert len(await stage.cluster.connections_of(stage.other)) == 1
    await stage.cluster.close_user(stage.user)
    await stage.cluster.close_user("nobody")


async def test_the_list_of_all_tells_what_a_connection_is(stage: Stage) -> None:
    await stage.connect(stage.user)

    async def mine() -> LiveConnection | None:
        return (await listed(stage)).get(stage.user)

    found = await eventually(mine)
    assert found is not None
    assert (found.user, found.vhost, found.client_id) == (stage.user, "/", stage.user)
    assert found.protocol.startswith("MQTT")
    assert found.connected_at > 1.6e9
    assert await stage.cluster.details(found.name) == found
    assert await stage.cluster.details("no such connection") is None


async def test_one_connection_is_closed_and_one_that_is_gone_is_no_error(stage: Stage) -> None:
    await stage.connect(stage.user)
    await stage.connect(stage.other)
    (found,) = await stage.cluster.connections_of(stage.user)

    async def known() -> LiveConnection | None:
        return await stage.cluster.details(found.name)

    await eventually(known)
    assert await stage.cluster.close_connection(found.name)

    async def gone() -> bool:
        return await stage.cluster.connections_of(stage.user) == []

    await eventually(gone)

    async def known_no_more() -> bool:
        return not await stage.cluster.close_connection(found.name)

    await eventually(known_no_more)
    assert len(await stage.cluster.connections_of(stage.other)) == 1


async def test_queues_are_found_by_name_and_in_the_list_of_all(stage: Stage) -> None:
    await stage.connect(stage.user, f"fleet/{stage.user}/commands/#")
    await stage.connect(stage.other, f"fleet/{stage.other}/commands/#")

    async def names(pattern: str | None) -> set[str]:
        return {queue.name async for part in stage.cluster.queues(pattern) for queue in part}

    mine, others = session(stage.user).name, session(stage.other).name
    assert await names(f"{SESSION_QUEUES}({stage.user})") == {mine}
    assert {mine, others} <= await names(None)
    assert await names(f"{SESSION_QUEUES}(nobody)") == set()
    actions = ClusterActions(stage.cluster, None, 1)
    assert {each.client_id for each in await actions.sessions([stage.user])} == {stage.user}
    assert await actions.sessions([f"{stage.user[:-1]}."]) == []  # a dot is a dot


async def test_bindings_of_one_queue_and_of_all(stage: Stage) -> None:
    await stage.connect(stage.user, f"fleet/{stage.user}/commands/#", f"fleet/{stage.user}/telemetry/+")
    queue = session(stage.user)
    found = {binding.routing_key: binding for binding in await stage.cluster.bindings(queue)}
    assert set(found) == {f"fleet.{stage.user}.commands.#", f"fleet.{stage.user}.telemetry.*"}
    every = [pair async for part in stage.cluster.all_bindings("/") for pair in part]
    assert {binding.routing_key for name, binding in every if name == queue.name} == set(found)
    await stage.cluster.unbind(queue, found[f"fleet.{stage.user}.telemetry.*"])
    await stage.cluster.unbind(queue, found[f"fleet.{stage.user}.telemetry.*"])
    assert [b.routing_key for b in await stage.cluster.bindings(queue)] == [f"fleet.{stage.user}.commands.#"]
    assert await stage.cluster.bindings(session("nobody")) == []


async def test_whether_a_queue_is_empty_and_deleting_it(stage: Stage) -> None:
    await stage.connect(stage.user, f"fleet/{stage.user}/telemetry/#")
    queue = session(stage.user)
    assert await stage.cluster.is_empty(queue)
    await stage.cluster.close_user(stage.user)
    await stage.queue_message(stage.user, f"fleet/{stage.user}/telemetry/x")
    assert not await stage.cluster.is_empty(queue)
    assert not await stage.cluster.is_empty(queue)  # it was put back
    await stage.cluster.delete_queue(queue)
    await stage.cluster.delete_queue(queue)
    assert await stage.cluster.is_empty(queue)
    assert await stage.cluster.bindings(queue) == []


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
    stage: Stage, call: Callable[[Cluster], Awaitable[object]]
) -> None:
    with pytest.raises(ClusterUnreachable, match=f"cluster {stage.silent.name} "):
        await call(stage.silent)


async def _all(parts: object) -> list[Connection]:
    return [each async for part in parts for each in part]  # type: ignore[attr-defined]
