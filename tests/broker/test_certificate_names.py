"""A certificate identifies exactly the device with its common name, whatever else it contains."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from .clients import Management
from .fleet import Fleet
from .identities import Certificates
from .mqtt import Disconnected, MQTTClient, connect_all
from .node import Broker

Clients = Callable[..., MQTTClient]
REFUSED = 0x86


async def test_names_that_look_like_a_device_are_nobody(mqtt: Clients, fleet: Fleet) -> None:
    """All of these are signed by the devices' authority; none may log in as the device it resembles."""
    victim = fleet.device()
    names = [
        f"/:{victim}",  # RabbitMQ would take the part before the colon for the virtual host
        f"nosuch:{victim}",
        f":{victim}",
        f"{victim}:",
        victim.lower(),
        f"{victim} ",
        f" {victim}",
        f"{victim}\n",
        f"{victim}&username={victim}",
        victim.replace("A", "\u0410"),  # a Cyrillic letter
        f"{victim},{victim}",
        "monitoring",  # an account that logs in by password
    ]
    unknown, missing = (
        fleet.service.denials(endpoint="user", reason=r) for r in ("unknown_identity", "password_missing")
    )
    answers = await connect_all(*(mqtt(name, client_id=victim) for name in names))
    assert answers == [REFUSED] * len(names)
    assert fleet.service.denials(endpoint="user", reason="unknown_identity") == unknown + len(names) - 1
    assert fleet.service.denials(endpoint="user", reason="password_missing") == missing + 1


async def test_a_certificate_with_two_names_is_neither(mqtt: Clients, certificates: Certificates, fleet: Fleet) -> None:
    """RabbitMQ joins them with a comma, which no device name can contain."""
    one, other = fleet.device(), fleet.device()
    unknown = fleet.service.denials(endpoint="user", reason="unknown_identity")
    attempts = []
    for first, second in ((one, other), (other, one)):
        identity = certificates.device(first, more_common_names=[second])
        attempts += [mqtt(identity, client_id=client_id) for client_id in (one, other)]
    assert await connect_all(*attempts) == [REFUSED] * 4
    assert fleet.service.denials(endpoint="user", reason="unknown_identity") == unknown + 4


@pytest.mark.parametrize(("begins", "ends"), [(-2, -1), (1, 2)])
async def test_a_certificate_out_of_its_time_does_not_reach_the_service(
    mqtt: Clients, certificates: Certificates, fleet: Fleet, begins: int, ends: int
) -> None:
    """Expired or not valid yet, it is refused by TLS."""
    now, me = datetime.now(UTC), fleet.device()
    identity = certificates.device(me, not_before=now + timedelta(days=begins), not_after=now + timedelta(days=ends))
    requests = fleet.service.count("authbackend_decisions", endpoint="user")
    with pytest.raises((Disconnected, OSError)):
        await mqtt(identity).connect()
    assert fleet.service.count("authbackend_decisions", endpoint="user") == requests


async def test_monitoring_sees_the_certificate_of_a_connection(
    mqtt: Clients, management: Callable[..., Management], fleet: Fleet
) -> None:
    """The management API shows the user name and certificate of each connection."""
    me = fleet.device()
    client = mqtt(me, user_properties=[("client_type", "APM")])
    assert await client.connect() == 0
    async with management("monitoring", "monitoring") as api:
        status, listed = await api.get(f"connections/username/{me}")
        assert (status, [connection["user"] for connection in listed]) == (200, [me])
        # The full list comes from statistics, which a new connection reports within five seconds.
        async with asyncio.timeout(15):
            while not (connections := [c for c in (await api.get("connections"))[1] if c.get("user") == me]):
                await asyncio.sleep(0.1)
        assert connections[0]["peer_cert_subject"] == f"CN={me}"


@pytest.mark.parametrize("version", [4, 5])
async def test_a_device_logs_in_over_websocket(mqtt: Clients, lax_broker: Broker, fleet: Fleet, version: int) -> None:
    """The optional listener accepts the certificate too, and the same rules apply."""
    me, other = fleet.device(), fleet.device()
    options = {"websocket": True, "port": lax_broker.doors.web_mqtt_tls, "version": version}
    client, unknown = mqtt(me, **options), mqtt("APM9999", **options)
    assert await connect_all(client, unknown) == [0, REFUSED]
    assert await client.subscribe(f"fleet/{me}/telemetry/#") == [1]
    assert await client.publish(f"fleet/{me}/telemetry/speed", b"x") == 0
    assert (await client.message()).payload == b"x"
    with pytest.raises(Disconnected):
        await client.publish(f"fleet/{other}/telemetry/speed", b"x")
