"""Sessions that outlive their connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .fleet import Fleet
from .mqtt import MQTTClient

Clients = Callable[..., MQTTClient]


def _persistent(version: int) -> dict[str, Any]:
    return {"version": version, "clean": False, "session_expiry_s": 60 if version == 5 else 0}


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("lost", [True, False])
async def test_a_session_is_resumed_without_a_denial(mqtt: Clients, fleet: Fleet, version: int, lost: bool) -> None:
    """
    With subscriptions of QoS 0 and 1, after a lost connection and after DISCONNECT. Messages sent meanwhile arrive.
    """
    me = fleet.device()
    denied = fleet.service.denials()
    writer = mqtt(me, client_id=f"{me}_pub")
    assert await writer.connect() == 0
    first = mqtt(me, **_persistent(version))
    assert await first.connect() == 0
    assert not first.session_present
    assert await first.subscribe(f"fleet/{me}/telemetry/zero", qos=0) == [0]
    assert await first.subscribe(f"fleet/{me}/telemetry/one", qos=1) == [1]
    await (first.drop() if lost else first.disconnect())
    assert await writer.publish(f"fleet/{me}/telemetry/one", b"meanwhile") == 0

    second = mqtt(me, **_persistent(version))
    assert await second.connect() == 0
    assert second.session_present
    assert (await second.message()).payload == b"meanwhile"
    for name, qos in (("zero", 0), ("one", 1)):
        assert await writer.publish(f"fleet/{me}/telemetry/{name}", b"live") == 0
        message = await second.message()
        assert (message.topic, message.qos) == (f"fleet/{me}/telemetry/{name}", qos)
    assert fleet.service.denials() == denied


@pytest.mark.parametrize("version", [4, 5])
async def test_a_clean_start_forgets_the_old_session(mqtt: Clients, fleet: Fleet, version: int) -> None:
    """RabbitMQ deletes its queues, which needs permission; queued messages are deleted."""
    me = fleet.device()
    denied = fleet.service.denials()
    old = mqtt(me, **_persistent(version))
    assert await old.connect() == 0
    assert await old.subscribe(f"fleet/{me}/telemetry/zero", qos=0) == [0]
    assert await old.subscribe(f"fleet/{me}/telemetry/#") == [1]
    await old.disconnect()
    new = mqtt(me, version=version)
    assert await new.connect() == 0
    assert not new.session_present
    again = mqtt(me, client_id=f"{me}_pub")
    assert await again.connect() == 0
    assert await again.publish(f"fleet/{me}/telemetry/x", b"x") == 0x10
    assert fleet.service.denials() == denied


async def test_a_revoked_devices_session_stays_closed_to_it(mqtt: Clients, fleet: Fleet) -> None:
    """Messages queued for a revoked device are not delivered, and are still there when it is reinstated."""
    me = fleet.device()
    session = _persistent(5)
    first = mqtt(me, **session)
    assert await first.connect() == 0
    assert await first.subscribe("test") == [1]
    await first.disconnect()
    await fleet.change(f"update device set status = 'revoked' where device_id = '{me}'")
    writer = mqtt(fleet.device())
    assert await writer.connect() == 0
    assert await writer.publish("test", b"queued") == 0
    refused = mqtt(me, **session)
    assert await refused.connect() == 0x86
    assert refused.messages() == []
    await fleet.change(f"update device set status = 'active' where device_id = '{me}'")
    back = mqtt(me, **session)
    assert await back.connect() == 0
    assert (await back.message()).payload == b"queued"
