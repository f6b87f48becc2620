"""A valid certificate is not enough: the device must be registered, active, not expired, and on an allowed network and
virtual host."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from .fleet import Fleet
from .mqtt import Disconnected, MQTTClient, connect_all

Clients = Callable[..., MQTTClient]
LOGIN_REFUSED, VHOST_REFUSED = 0x86, 0x87
INACTIVE = {
    "APM9999": "unknown_identity",
    "APM0010": "device_pending",
    "APM0011": "device_suspended",
    "APM0012": "device_revoked",
    "APM0013": "device_expired",
}


@pytest.mark.parametrize("version", [4, 5])
async def test_inactive_devices_are_refused_at_login(mqtt: Clients, fleet: Fleet, version: int) -> None:
    """Each for its own reason, under which it is counted."""

    def counted() -> dict[str, int]:
        return {reason: fleet.service.denials(endpoint="user", reason=reason) for reason in INACTIVE.values()}

    before = counted()
    answers = await connect_all(*(mqtt(name, version=version) for name in INACTIVE))
    assert answers == [LOGIN_REFUSED] * len(INACTIVE)
    assert counted() == {reason: number + 1 for reason, number in before.items()}


async def test_a_device_in_the_wrong_place_is_refused(mqtt: Clients, fleet: Fleet) -> None:
    """The login is allowed, but the type only allows another network or another virtual host."""
    reasons = ("address_not_in_networks", "vhost_not_listed")
    before = [fleet.service.denials(endpoint="vhost", reason=reason) for reason in reasons]
    answers = await connect_all(mqtt("FAR0001"), mqtt("ELSE001"))
    assert answers == [VHOST_REFUSED, VHOST_REFUSED]
    assert [fleet.service.denials(endpoint="vhost", reason=reason) for reason in reasons] == [n + 1 for n in before]


async def test_the_devices_networks_are_those_of_its_connection(mqtt: Clients, fleet: Fleet) -> None:
    """RabbitMQ's dual-stack listener reports an IPv4 address as ::ffff:127.0.0.1; the IPv4 network covers it."""
    me = fleet.device()
    await fleet.change(
        "insert into device_type (name, client_ids, vhosts, networks) values"
        " ('NEAR', '{\"{device_id}\"}', '{/}', '{127.0.0.0/8,::1/128}');"
        f"update device set type = 'NEAR' where device_id = '{me}'"
    )
    assert await mqtt(me).connect() == 0


async def test_suspending_and_reinstating(mqtt: Clients, fleet: Fleet) -> None:
    """With the command; both take effect at the next login."""
    me = fleet.device()
    await fleet.command("device", "suspend", me, "--reason", "in repair")
    assert await mqtt(me).connect() == LOGIN_REFUSED
    await fleet.command("device", "reinstate", me)
    assert await mqtt(me).connect() == 0


async def test_a_new_device_works_once_it_is_activated(mqtt: Clients, fleet: Fleet) -> None:
    """It is registered as pending and refused, then activated and allowed."""
    await fleet.command("device", "add", "NEW-1", "--type", "APM", "--status", "pending", "--common-name", "new one")
    assert await mqtt("new one", client_id="NEW-1").connect() == LOGIN_REFUSED
    await fleet.command("device", "reinstate", "NEW-1")
    client = mqtt("new one", client_id="NEW-1")
    assert await client.connect() == 0
    assert await client.publish("fleet/NEW-1/telemetry/x", b"x") == 0x10


async def test_a_device_expires_while_it_is_connected(mqtt: Clients, fleet: Fleet) -> None:
    """Without any action: from that second on, its requests are denied."""
    me = fleet.device()
    client = mqtt(me)
    assert await client.connect() == 0
    await fleet.change(f"update device set expires_at = now() + interval '2 seconds' where device_id = '{me}'")
    with pytest.raises(Disconnected):
        async with asyncio.timeout(30):
            # A new topic each time: RabbitMQ caches what is allowed.
            for number in range(1000):
                assert await client.publish(f"fleet/{me}/telemetry/{number}", b"x") == 0x10
                await asyncio.sleep(0.1)
    assert fleet.database.sql(f"select now() >= expires_at from device where device_id = '{me}'") == "t"
