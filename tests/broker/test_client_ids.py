"""Client ids are bound to devices: RabbitMQ gives the session of a client id to any client that may log in with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .fleet import Fleet
from .mqtt import MQTTClient, connect_all

Clients = Callable[..., MQTTClient]
REFUSED, TAKEN_OVER = 0x86, 0x8E


@pytest.mark.parametrize("version", [4, 5])
async def test_another_devices_client_id_is_refused_before_the_takeover(
    mqtt: Clients, fleet: Fleet, version: int
) -> None:
    """The device stays connected and gets its queued messages; nobody else has received or deleted them."""
    victim, thief = fleet.device(), fleet.device()
    session: dict[str, Any] = {"version": version, "clean": False, "session_expiry_s": 60 if version == 5 else 0}
    online, asleep = mqtt(victim, **session), mqtt(victim, client_id=f"{victim}_asleep", **session)
    assert await connect_all(online, asleep) == [0, 0]
    assert await online.subscribe(f"fleet/{victim}/telemetry/#") == [1]
    assert await asleep.subscribe(f"fleet/{victim}/telemetry/#") == [1]
    await asleep.disconnect()
    writer = mqtt(victim, client_id=f"{victim}_pub")
    assert await writer.connect() == 0
    assert await writer.publish(f"fleet/{victim}/telemetry/speed", b"1") == 0

    before = fleet.service.denials(endpoint="user", reason="client_id_not_bound")
    thieves = [
        mqtt(thief, client_id=client_id, version=wire, clean=clean, session_expiry_s=expiry)
        for client_id in (victim, f"{victim}_asleep")
        for wire, clean, expiry in ((4, True, 0), (4, False, 0), (5, True, 0), (5, False, 60))
    ]
    assert await connect_all(*thieves) == [REFUSED] * len(thieves)
    assert fleet.service.denials(endpoint="user", reason="client_id_not_bound") == before + len(thieves)

    assert await online.alive()
    assert await writer.publish(f"fleet/{victim}/telemetry/speed", b"2") == 0
    assert [(await online.message()).payload for _ in range(2)] == [b"1", b"2"]
    awake = mqtt(victim, client_id=f"{victim}_asleep", **session)
    assert await awake.connect() == 0
    assert awake.session_present
    assert [(await awake.message()).payload for _ in range(2)] == [b"1", b"2"]
    assert not any(client.messages() for client in thieves)


async def test_the_longest_device_id_owns_a_client_id(mqtt: Clients, fleet: Fleet) -> None:
    """With devices A and A_2, ``A_2_pub`` fits patterns of both, but belongs only to A_2, whatever its status."""
    short = fleet.device()
    long = f"{short}_2"
    await fleet.change(f"insert into device (device_id, type, status) values ('{long}', 'APM', 'active')")
    before = fleet.service.denials(endpoint="user", reason="client_id_of_another_device")
    assert await connect_all(
        mqtt(long, client_id=f"{long}_pub"),
        mqtt(short, client_id=f"{short}_3"),
        mqtt(short, client_id=long),
        mqtt(short, client_id=f"{long}_pub"),
    ) == [0, 0, REFUSED, REFUSED]
    await fleet.change(f"update device set status = 'revoked' where device_id = '{long}'")
    assert await mqtt(short, client_id=f"{long}_pub").connect() == REFUSED
    assert fleet.service.denials(endpoint="user", reason="client_id_of_another_device") == before + 3


async def test_client_ids_that_only_look_bound_are_refused(mqtt: Clients, fleet: Fleet) -> None:
    """An empty one (the broker generates one), a longer one without a separator, wildcards, and other letter cases."""
    me = fleet.device()
    client_ids = ["", f"{me}x", f"x{me}", me.lower(), f"{me} ", f"{me}-pub", "#", "*", f"+_{me}", "{device_id}"]
    before = fleet.service.denials(endpoint="user", reason="client_id_not_bound")
    answers = await connect_all(*(mqtt(me, client_id=client_id) for client_id in client_ids))
    assert answers == [REFUSED] * len(client_ids)
    assert fleet.service.denials(endpoint="user", reason="client_id_not_bound") == before + len(client_ids)


@pytest.mark.parametrize("ending", ["a b", "a+b", "a%20b", "a&username=x", "a=b;c", "ünï/日本", "#", "\U0001f4e6"])
async def test_odd_client_ids_work(mqtt: Clients, fleet: Fleet, ending: str) -> None:
    """The client id is in every request and in queue names; login, subscription and a resumed session work."""
    me = fleet.device()
    denied = fleet.service.denials()
    options: dict[str, Any] = {"client_id": f"{me}_{ending}", "clean": False, "session_expiry_s": 60}
    client = mqtt(me, **options)
    assert await client.connect() == 0
    assert await client.subscribe(f"fleet/{me}/telemetry/#") == [1]
    await client.drop()
    again = mqtt(me, **options)
    assert await again.connect() == 0
    assert again.session_present
    assert await again.publish(f"fleet/{me}/telemetry/x", b"x") == 0
    assert (await again.message()).payload == b"x"
    assert fleet.service.denials() == denied


async def test_a_device_takes_over_from_itself(mqtt: Clients, fleet: Fleet) -> None:
    """A device that reconnects with its client id gets its session, and its old connection ends."""
    me = fleet.device()
    first, second = (mqtt(me, clean=False, session_expiry_s=60) for _ in range(2))
    assert await first.connect() == 0
    assert await first.subscribe(f"fleet/{me}/telemetry/#") == [1]
    assert await second.connect() == 0
    assert await first.disconnected() == TAKEN_OVER
    assert second.session_present
    assert await second.publish(f"fleet/{me}/telemetry/x", b"x") == 0
    assert (await second.message()).payload == b"x"
