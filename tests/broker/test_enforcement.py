"""What the registry stops allowing ends for who is connected, on the wire and in stored sessions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio

from .clients import Management
from .fleet import Fleet
from .mqtt import MQTTClient
from .node import Broker
from .service import Service

Clients = Callable[..., MQTTClient]
REFUSED, NOBODY_SUBSCRIBED = 0x86, 0x10
SESSION = {"clean": False, "session_expiry_s": 600}


@pytest.fixture(scope="module")
def enforcing(broker: Broker, service: Service) -> Iterator[Service]:
    """The service, enforcing on the node."""
    service.stop()
    service.enforce(f"https://localhost:{broker.doors.management_tls}", sweep_interval_s="2")
    service.start()
    yield service
    service.stop()
    service.enforce()
    service.command("enforcement", "disable")
    service.start()


@pytest.fixture
def wait(enforcing: Service) -> Callable[..., Any]:
    """``wait("device", "revoke", NAME)`` runs a command with ``--wait`` and returns what it says."""

    async def run(*arguments: str) -> Any:
        return json.loads(await asyncio.to_thread(enforcing.command, *arguments, "--wait", "--json"))

    return run


@pytest_asyncio.fixture
async def api(management: Callable[..., Management], enforcing: Service) -> AsyncIterator[Management]:
    """The management API."""
    async with management("enforcer", "enforcer-password") as opened:
        yield opened


async def test_a_revoked_device_is_thrown_out_and_its_session_is_gone(
    mqtt: Clients, fleet: Fleet, api: Management, wait: Callable[..., Any]
) -> None:
    """Its connections end, nothing of its session is left, and the receipt says so; a neighbour notices nothing."""
    me, other = fleet.device(), fleet.device()
    client, second, neighbour = mqtt(me, **SESSION), mqtt(me, client_id=f"{me}_pub"), mqtt(other, **SESSION)
    for each in (client, second, neighbour):
        assert await each.connect() == 0
    await client.subscribe(f"fleet/{me}/commands/#")
    await neighbour.subscribe(f"fleet/{other}/commands/#")
    said = await wait("device", "revoke", me, "--reason", "stolen")
    assert await client.disconnected() is not None
    assert await second.disconnected() is not None
    (task,) = said["enforcement"]
    assert task["state"] == "done"
    assert task["causes"] == ["revoked"]
    assert task["receipt"]["closed"] == {"rabbit@localhost": 2}
    assert [queue["queue"] for queue in task["receipt"]["queues_deleted"]] == [f"mqtt-subscription-{me}qos1"]
    assert (await api.get(f"queues/%2F/mqtt-subscription-{me}qos1"))[0] == 404
    assert await mqtt(me).connect() == REFUSED
    assert await neighbour.alive()
    await wait("device", "reinstate", me)
    again = mqtt(me, **SESSION)
    assert await again.connect() == 0
    assert not again.session_present
