"""Wills are decided when they are sent; an allowed one causes no denial at any time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from .fleet import Fleet
from .mqtt import MQTTClient, Will, connect_all
from .processes import until

Clients = Callable[..., MQTTClient]


async def _reader(mqtt: Clients, device: str) -> MQTTClient:
    reader = mqtt(device)
    assert await reader.connect() == 0
    assert await reader.subscribe(f"fleet/{device}/telemetry/#") == [1]
    return reader


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("qos", [0, 1])
async def test_a_will_inside_the_rules_is_sent(mqtt: Clients, fleet: Fleet, version: int, qos: int) -> None:
    """It is sent when the connection is lost, and not after DISCONNECT."""
    me = fleet.device()
    denied = fleet.service.denials()
    reader = await _reader(mqtt, me)
    wills = {end: Will(f"fleet/{me}/telemetry/{end}", end.encode(), qos=qos) for end in ("ended", "lost")}
    ended, lost = (mqtt(me, client_id=f"{me}_{end}", version=version, will=will) for end, will in wills.items())
    assert await connect_all(ended, lost) == [0, 0]
    await ended.disconnect()
    await lost.drop()
    message = await reader.message()
    assert (message.topic, message.payload) == (f"fleet/{me}/telemetry/lost", b"lost")
    assert fleet.service.denials() == denied


@pytest.mark.parametrize("version", [4, 5])
async def test_a_will_outside_the_rules_is_dropped(mqtt: Clients, fleet: Fleet, version: int) -> None:
    """The login is allowed; the will is denied when it is due."""
    me, victim = fleet.device(), fleet.device()
    reader = await _reader(mqtt, victim)
    denied = fleet.service.denials(endpoint="topic", reason="no_rule_allows")
    lost = mqtt(me, version=version, will=Will(f"fleet/{victim}/telemetry/x", b"denied"))
    assert await lost.connect() == 0
    await lost.drop()
    await until(lambda: fleet.service.denials(endpoint="topic", reason="no_rule_allows") == denied + 1)
    assert await reader.publish(f"fleet/{victim}/telemetry/x", b"allowed") == 0
    assert (await reader.message()).payload == b"allowed"


async def test_delayed_wills(mqtt: Clients, fleet: Fleet) -> None:
    """
    One is sent, one is cancelled by a reconnect, one is denied by the rules; only the first arrives.

    It is due a second after the others, so that when it arrives, the others would have arrived.
    """
    me, victim = fleet.device(), fleet.device()
    own, others = await _reader(mqtt, me), await _reader(mqtt, victim)
    denied = fleet.service.denials()

    def loser(name: str, topic: str, delay_s: int) -> MQTTClient:
        will = Will(topic, name.encode(), delay_s=delay_s)
        return mqtt(me, client_id=f"{me}_{name}", will=will, clean=False, session_expiry_s=60)

    fires = loser("fires", f"fleet/{me}/telemetry/fires", 3)
    cancelled = loser("cancelled", f"fleet/{me}/telemetry/cancelled", 2)
    assert await connect_all(fires, cancelled) == [0, 0]
    assert await cancelled.subscribe(f"fleet/{me}/commands/#") == [1]
    await asyncio.gather(fires.drop(), cancelled.drop())
    back = mqtt(me, client_id=f"{me}_cancelled", clean=False, session_expiry_s=60)
    assert await back.connect() == 0
    assert back.session_present
    message = await own.message()
    assert (message.topic, message.payload) == (f"fleet/{me}/telemetry/fires", b"fires")
    assert await back.alive()
    assert fleet.service.denials() == denied

    topics = fleet.service.denials(endpoint="topic", reason="no_rule_allows")
    outside = loser("outside", f"fleet/{victim}/telemetry/x", 1)
    assert await outside.connect() == 0
    await outside.drop()
    await until(lambda: fleet.service.denials(endpoint="topic", reason="no_rule_allows") == topics + 1)
    assert await others.publish(f"fleet/{victim}/telemetry/x", b"allowed") == 0
    assert (await others.message()).payload == b"allowed"


async def test_the_delayed_will_of_a_session_that_ends_earlier(mqtt: Clients, fleet: Fleet) -> None:
    """The will is sent when the session ends, if that is before the delay is over."""
    me = fleet.device()
    reader = await _reader(mqtt, me)
    denied = fleet.service.denials()
    lost = mqtt(
        me,
        client_id=f"{me}_lost",
        will=Will(f"fleet/{me}/telemetry/lost", b"gone", delay_s=3600),
        clean=False,
        session_expiry_s=1,
    )
    assert await lost.connect() == 0
    await lost.drop()
    assert (await reader.message()).payload == b"gone"
    assert fleet.service.denials() == denied


async def test_a_revoked_device_has_no_will(mqtt: Clients, fleet: Fleet) -> None:
    """It is decided when it is due, and by then the device is revoked."""
    me, neighbour = fleet.device(), fleet.device()
    await fleet.change(
        f"insert into topic_rule (device_id, effect, action, topic) values"
        f" ('{neighbour}', 'allow', 'subscribe', 'fleet/{me}/telemetry/#'),"
        f" ('{neighbour}', 'allow', 'publish', 'fleet/{me}/telemetry/#')"
    )
    reader = mqtt(neighbour)
    assert await reader.connect() == 0
    assert await reader.subscribe(f"fleet/{me}/telemetry/#") == [1]
    lost = mqtt(me, will=Will(f"fleet/{me}/telemetry/lost", b"gone"))
    assert await lost.connect() == 0
    denied = fleet.service.denials(reason="device_revoked")
    await fleet.change(f"update device set status = 'revoked' where device_id = '{me}'")
    await lost.drop()
    await until(lambda: fleet.service.denials(reason="device_revoked") > denied)
    assert await reader.publish(f"fleet/{me}/telemetry/x", b"allowed") == 0
    assert (await reader.message()).payload == b"allowed"
