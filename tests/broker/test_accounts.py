"""Accounts of people and services, by password or certificate, on the management API and over MQTT."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .clients import Management
from .fleet import Fleet
from .mqtt import Disconnected, MQTTClient, connect_all

Clients = Callable[..., MQTTClient]
Managements = Callable[..., Management]
LOGIN_REFUSED = 0x86
DASHBOARD = {"username": "dashboard", "password": "dashboard-password", "client_id": "dashboard-1"}


async def _status(management: Managements, name: str, password: str, path: str = "overview") -> int:
    async with management(name, password) as api:
        status, _ = await api.get(path)
        return status


async def test_the_tag_of_an_account_works(management: Managements, fleet: Fleet) -> None:
    """``monitoring`` can see everything, but not do what needs ``administrator``."""
    async with management("monitoring", "monitoring") as api:
        assert (await api.get("overview"))[0] == 200
        status, user = await api.get("whoami")
        assert (status, user["name"], user["tags"]) == (200, "monitoring", ["monitoring"])
        assert (await api.request("PUT", "vhosts/new"))[0] == 401
        assert (await api.delete("connections/username/nobody"))[0] == 401


async def test_who_may_not_use_the_management_api(management: Managements, fleet: Fleet) -> None:
    """A wrong password, an account without tags, an unknown name and a device; each is counted by its reason."""
    me = fleet.device()
    attempts = {
        ("monitoring", "wrong"): "password_wrong",
        ("monitoring", ""): "password_wrong",
        ("nobody", "x"): "unknown_identity",
        (me, "none"): "password_on_certificate_identity",
        ("collector", "none"): "password_on_certificate_identity",
    }

    def counted() -> dict[str, int]:
        return {reason: fleet.service.denials(endpoint="user", reason=reason) for reason in set(attempts.values())}

    before = counted()
    for name, password in attempts:
        assert await _status(management, name, password) == 401
    assert counted() == {reason: n + list(attempts.values()).count(reason) for reason, n in before.items()}
    assert await _status(management, "untagged", "plain-account") == 401


async def test_a_password_is_changed(management: Managements, fleet: Fleet) -> None:
    """With the command: the old one is refused immediately, although successful logins are cached for a minute."""
    add = ("account", "add", "operator", "--tag", "monitoring", "--vhost", "/", "--password-file", "-")
    await fleet.command(*add, stdin="first password\n")
    assert await _status(management, "operator", "first password") == 200
    assert await _status(management, "operator", "first password") == 200
    await fleet.command("account", "passwd", "operator", "--password-file", "-", stdin="second password\n")
    assert await _status(management, "operator", "first password") == 401
    assert await _status(management, "operator", "second password") == 200
    await fleet.change("delete from account where name = 'operator'")
    assert await _status(management, "operator", "second password") == 401


async def test_an_account_uses_mqtt_with_its_own_client_id(mqtt: Clients, fleet: Fleet) -> None:
    """The listener needs a certificate of the devices' authority; name and password identify the account."""
    me, carrier = fleet.device(), fleet.device()
    dashboard, device = mqtt(carrier, **DASHBOARD), mqtt(me)
    assert await connect_all(dashboard, device) == [0, 0]
    assert await dashboard.subscribe("fleet/+/telemetry/#") == [1]
    assert await device.publish(f"fleet/{me}/telemetry/x", b"x") == 0
    assert (await dashboard.message()).topic == f"fleet/{me}/telemetry/x"
    assert await dashboard.subscribe("fleet/+/commands/#") == [0x87]
    again = mqtt(carrier, **DASHBOARD)
    assert await again.connect() == 0
    with pytest.raises(Disconnected):
        await again.publish(f"fleet/{me}/commands/stop", b"x")


async def test_an_account_with_a_devices_client_id_is_refused(mqtt: Clients, fleet: Fleet) -> None:
    """Name and password are correct, but the client id would take over the device's session, which stays."""
    victim, carrier = fleet.device(), fleet.device()
    session = {"clean": False, "session_expiry_s": 60}
    online, asleep = mqtt(victim, **session), mqtt(victim, client_id=f"{victim}_asleep", **session)
    assert await connect_all(online, asleep) == [0, 0]
    assert await online.subscribe(f"fleet/{victim}/telemetry/#") == [1]
    assert await asleep.subscribe(f"fleet/{victim}/telemetry/#") == [1]
    await asleep.disconnect()
    assert await online.publish(f"fleet/{victim}/telemetry/x", b"queued") == 0

    before = fleet.service.denials(endpoint="user", reason="client_id_not_bound", device_type="account")
    attempts = [
        mqtt(carrier, **(DASHBOARD | {"client_id": client_id, "version": version, "clean": clean}))
        for client_id in (victim, f"{victim}_asleep", "dashboard-2", "")
        for version, clean in ((4, True), (5, True), (5, False))
    ]
    # Also an account that logs in by certificate.
    attempts += [mqtt("collector", client_id=client_id) for client_id in (victim, "collector")]
    assert await connect_all(*attempts) == [LOGIN_REFUSED] * len(attempts)
    after = fleet.service.denials(endpoint="user", reason="client_id_not_bound", device_type="account")
    assert after == before + len(attempts)

    assert await online.alive()
    assert (await online.message()).payload == b"queued"
    awake = mqtt(victim, client_id=f"{victim}_asleep", **session)
    assert await awake.connect() == 0
    assert (await awake.message()).payload == b"queued"


async def test_an_accounts_client_id_is_taken_to_the_letter(mqtt: Clients, fleet: Fleet) -> None:
    """Characters that a form must escape, and what a wrong decoder would turn them into."""
    carrier = fleet.device()
    others = ["dash+board 100%ü", "dash%20board 100%ü", "dash board 100%25ü", "dash board 100%Ü", "dash board 100"]
    clients = [mqtt(carrier, **(DASHBOARD | {"client_id": name})) for name in ["dash board 100%ü", *others]]
    assert await connect_all(*clients) == [0] + [LOGIN_REFUSED] * len(others)


async def test_wrong_passwords_do_not_disturb_devices(mqtt: Clients, fleet: Fleet) -> None:
    """During thirty concurrent guesses, devices log in as usual; afterwards, so does the account."""
    carrier = fleet.device()
    guesses = [
        mqtt(carrier, **(DASHBOARD | {"password": f"guess {number}", "client_id": "dashboard-1"}))
        for number in range(30)
    ]
    devices = [mqtt(fleet.device()) for _ in range(5)]
    answers = await connect_all(*guesses, *devices)
    assert answers == [LOGIN_REFUSED] * len(guesses) + [0] * len(devices)
    assert await mqtt(carrier, **DASHBOARD).connect() == 0
