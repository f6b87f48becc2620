"""A client that claims to be a device without its certificate is refused everywhere; the device is not affected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from .fleet import Fleet
from .mqtt import MQTTClient, connect_all
from .node import Broker

Clients = Callable[..., MQTTClient]
REFUSED = 0x86
REASON = "password_on_certificate_identity"


@dataclass(frozen=True, slots=True)
class Door:
    """A listener, and what RabbitMQ itself does there with a password before it sends a request."""

    lax: bool
    certificate: bool
    plain: bool = False


DOORS = {
    "plain": Door(lax=True, certificate=False, plain=True),
    "tls without certificate": Door(lax=True, certificate=False),
    "tls with another certificate, lax": Door(lax=True, certificate=True),
    "tls with another certificate": Door(lax=False, certificate=True),
}
PASSWORDS = ("none", "x", "", None)
ASKED_ABOUT = ("none", "x")
"""RabbitMQ 4.x refuses an empty or missing password by itself."""


@pytest.mark.parametrize("name", DOORS)
async def test_a_devices_name_with_a_password_is_refused(
    mqtt: Clients, broker: Broker, lax_broker: Broker, fleet: Fleet, name: str
) -> None:
    """With the device's client id and others; its connection, subscriptions and queued messages are not affected."""
    victim, thief = fleet.device(), fleet.device()
    door = DOORS[name]
    port = (lax_broker if door.lax else broker).doors.mqtt_tls
    session = {"port": port, "clean": False, "session_expiry_s": 60}
    online, asleep = mqtt(victim, **session), mqtt(victim, client_id=f"{victim}_asleep", **session)
    assert await connect_all(online, asleep) == [0, 0]
    assert await online.subscribe(f"fleet/{victim}/telemetry/#") == [1]
    assert await asleep.subscribe(f"fleet/{victim}/telemetry/#") == [1]
    await asleep.disconnect()
    writer = mqtt(victim, client_id=f"{victim}_pub", port=port)
    assert await writer.connect() == 0
    assert await writer.publish(f"fleet/{victim}/telemetry/speed", b"queued") == 0
    assert (await online.message()).payload == b"queued"

    before = fleet.service.denials(endpoint="user", reason=REASON)
    identity = thief if door.certificate else None
    where: dict[str, Any] = {
        "plain": door.plain,
        "port": lax_broker.doors.mqtt_plain if door.plain else port,
    }
    attempts = [
        mqtt(identity, client_id=client_id, username=victim, password=password, version=version, clean=clean, **where)
        for password in PASSWORDS
        for client_id in (victim, f"{victim}_asleep", thief)
        for version, clean in ((4, True), (4, False), (5, False))
    ]
    assert await connect_all(*attempts) == [REFUSED] * len(attempts)
    expected = len(attempts) * len(ASKED_ABOUT) // len(PASSWORDS)
    assert fleet.service.denials(endpoint="user", reason=REASON) == before + expected

    assert await online.alive()
    assert await writer.publish(f"fleet/{victim}/telemetry/speed", b"live") == 0
    assert (await online.message()).payload == b"live"
    awake = mqtt(victim, client_id=f"{victim}_asleep", **session)
    assert await awake.connect() == 0
    assert awake.session_present
    assert [(await awake.message()).payload for _ in range(2)] == [b"queued", b"live"]


async def test_without_name_and_certificate_nobody_gets_in(mqtt: Clients, lax_broker: Broker, fleet: Fleet) -> None:
    """Anonymously, or with a password and no name: RabbitMQ refuses without a request, or the service denies."""
    doors = ({"plain": True, "port": lax_broker.doors.mqtt_plain}, {"port": lax_broker.doors.mqtt_tls})
    victim = fleet.device()
    attempts = [
        mqtt(None, client_id=victim, version=version, username=username, password=password, **door)
        for door in doors
        for version in (4, 5)
        for username, password in ((None, None), ("", "none"))
    ]
    assert await connect_all(*attempts) == [REFUSED] * len(attempts)


async def test_the_owners_certificate_with_its_name_and_a_password_is_refused(mqtt: Clients, fleet: Fleet) -> None:
    """Devices have no password. A client that sends one is never logged in by certificate."""
    me = fleet.device()
    before = fleet.service.denials(endpoint="user", reason=REASON)
    assert await mqtt(me, username=me, password="none").connect() == REFUSED
    assert fleet.service.denials(endpoint="user", reason=REASON) == before + 1


async def test_a_certificate_account_has_no_password_either(mqtt: Clients, fleet: Fleet) -> None:
    """The same attack with the name of a service that logs in by certificate."""
    before = fleet.service.denials(endpoint="user", reason=REASON, device_type="account")
    attempts = [mqtt(fleet.device(), username="collector", password=password) for password in ("none", "x")]
    assert await connect_all(*attempts) == [REFUSED] * 2
    assert fleet.service.denials(endpoint="user", reason=REASON, device_type="account") == before + 2
