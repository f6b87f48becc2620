"""Connections and stored sessions end when the registry no longer allows them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography import x509

from .clients import Management, connect_amqp
from .fleet import Fleet
from .identities import Certificates
from .mqtt import MQTTClient
from .node import Broker
from .processes import HarnessError, until
from .service import Service

Clients = Callable[..., MQTTClient]
REFUSED, NOBODY_SUBSCRIBED = 0x86, 0x10
SESSION = {"clean": False, "session_expiry_s": 600}


@pytest.fixture(scope="module")
def enforcing(broker: Broker, service: Service) -> Iterator[Service]:
    """The service, with enforcement on the node."""
    service.stop()
    service.enforce(f"https://localhost:{broker.doors.management_tls}", sweep_interval_s="2")
    # A killed replica might still be answering for this long; until then, nothing is confirmed.
    service.configure(REGISTRY__MAX_STALENESS_S="10")
    service.start()
    yield service
    service.stop()
    service.enforce("")
    service.configure(REGISTRY__MAX_STALENESS_S="")
    service.command("enforcement", "disable")
    service.start()


@pytest.fixture
def wait(enforcing: Service) -> Callable[..., Any]:
    """``wait("device", "revoke", NAME)`` runs a command with ``--wait`` and returns its output."""

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
    """Its connections end, its session is deleted, and the receipt lists both; another device is not affected."""
    me, other = fleet.device(), fleet.device()
    client, second, neighbour = mqtt(me, **SESSION), mqtt(me, client_id=f"{me}_pub"), mqtt(other, **SESSION)
    for each in (client, second, neighbour):
        assert await each.connect() == 0
    await client.subscribe(f"fleet/{me}/commands/#")
    await neighbour.subscribe(f"fleet/{other}/commands/#")
    output = await wait("device", "revoke", me, "--reason", "stolen")
    assert await client.disconnected() is not None
    assert await second.disconnected() is not None
    (task,) = output["enforcement"]
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


async def test_by_psql_with_nobody_waiting(mqtt: Clients, fleet: Fleet, enforcing: Service) -> None:
    """Changing the row with psql is enough."""
    me = fleet.device()
    client = mqtt(me)
    assert await client.connect() == 0
    await fleet.change(f"update device set status = 'suspended' where device_id = '{me}'")
    assert await client.disconnected(5) is not None


async def test_a_narrowed_device_keeps_what_it_may_still_subscribe_to(
    mqtt: Clients, fleet: Fleet, api: Management, enforcing: Service
) -> None:
    """It may not log in while its session is repaired; afterwards, the rest of the session is still there."""
    me = fleet.device()
    client = mqtt(me, **SESSION)
    assert await client.connect() == 0
    assert await client.subscribe(f"fleet/{me}/commands/#", f"fleet/{me}/telemetry/#") == [1, 1]
    await fleet.change(
        f"insert into topic_rule (device_id, effect, action, topic) values ('{me}', 'deny', 'subscribe', 'fleet/+/telemetry/#')"
    )
    assert await client.disconnected(5) is not None
    held = fleet.service.denials(endpoint="user", reason="enforcement_in_progress")
    assert await mqtt(me, **SESSION).connect() == REFUSED
    assert fleet.service.denials(endpoint="user", reason="enforcement_in_progress") == held + 1
    task = await done(enforcing, me)
    queue = f"mqtt-subscription-{me}qos1"
    removed = task["receipt"]["subscriptions_removed"]
    assert [(each["queue"], each["filter"], each["why"]) for each in removed] == [
        (queue, f"fleet.{me}.telemetry.#", "rule_denies")
    ]
    assert task["receipt"]["queues_deleted"] == []
    again = mqtt(me, **SESSION)
    assert await again.connect() == 0
    assert again.session_present
    _, bindings = await api.get(f"queues/%2F/{queue}/bindings")
    assert {each["routing_key"] for each in bindings if each["source"]} == {f"fleet.{me}.commands.#"}
    sender = mqtt(me, client_id=f"{me}_pub")
    assert await sender.connect() == 0
    await sender.publish(f"fleet/{me}/telemetry/1", b"x")
    assert again.messages() == []


async def done(service: Service, name: str, kind: str = "device") -> Any:
    """Wait until the newest task for this name is done, and return it."""

    def newest() -> Any:
        return json.loads(service.command("enforcement", "list", "--kind", kind, "--name", name, "--json"))[0]

    async with asyncio.timeout(60):
        while (task := await asyncio.to_thread(newest))["state"] != "done":
            await asyncio.sleep(0.1)
    return task


async def test_messages_of_a_forbidden_subscription_go_with_the_session(
    mqtt: Clients, fleet: Fleet, enforcing: Service
) -> None:
    """Queued messages cannot be separated by subscription: the device loses its session, and the receipt says so."""
    me = fleet.device()
    client = mqtt(me, **SESSION)
    assert await client.connect() == 0
    assert await client.subscribe(f"fleet/{me}/telemetry/#") == [1]
    await client.disconnect()
    sender = mqtt(me, client_id=f"{me}_pub")
    assert await sender.connect() == 0
    assert await sender.publish(f"fleet/{me}/telemetry/1", b"secret") == 0
    await fleet.change(
        f"insert into topic_rule (device_id, effect, action, topic) values ('{me}', 'deny', 'subscribe', 'fleet/+/telemetry/#')"
    )
    task = await done(enforcing, me)
    (deleted,) = task["receipt"]["queues_deleted"]
    assert deleted["queue"] == f"mqtt-subscription-{me}qos1"
    assert deleted["why"].startswith("rule_denies")
    again = mqtt(me, **SESSION)
    assert await again.connect() == 0
    assert not again.session_present
    assert again.messages() == []


async def test_a_rule_of_a_type_touches_those_whom_it_takes_something_from(
    mqtt: Clients, fleet: Fleet, enforcing: Service
) -> None:
    """A publisher of the type must reconnect; a device of another type is not affected."""
    me = fleet.device()
    client, reader = mqtt(me), mqtt("READER1")
    assert await client.connect() == 0
    assert await reader.connect() == 0
    assert await client.publish("test", b"x") == NOBODY_SUBSCRIBED
    rule = "device_type = 'APM' and action = 'publish' and topic = 'test'"
    try:
        await fleet.change(f"delete from topic_rule where {rule}")
        assert await client.disconnected(10) is not None
        task = await done(enforcing, "APM", "device_type")
        assert task["receipt"]["devices"] >= 1
        assert await reader.alive()
        again = mqtt(me)
        assert await again.connect() == 0
    finally:
        await fleet.change(
            "insert into topic_rule (device_type, effect, action, topic) values ('APM', 'allow', 'publish', 'test')"
        )


async def test_a_rule_that_is_replaced_by_a_wider_one_disturbs_nobody(
    mqtt: Clients, fleet: Fleet, enforcing: Service
) -> None:
    """The new rule allows everything that the removed one did."""
    me = fleet.device()
    await fleet.change(
        f"insert into topic_rule (device_id, effect, action, topic) values ('{me}', 'allow', 'publish', 'own/a')"
    )
    client = mqtt(me)
    assert await client.connect() == 0
    await fleet.change(f"update topic_rule set topic = 'own/#' where device_id = '{me}'")
    task = await done(enforcing, me)
    assert task["receipt"]["closed"] == {}
    assert await client.alive()


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ("delete from device where device_id = '{0}'", "deleted"),
        ("update device set common_name = '{0}-new' where device_id = '{0}'", "renamed"),
        ("update device set type = 'READER' where device_id = '{0}'", "retyped"),
        ("update device set device_id = '{0}-new' where device_id = '{0}'", "deleted"),
        ("update device set expires_at = now() where device_id = '{0}'", "expired"),
        ("update device set expires_at = now() + interval '1 second' where device_id = '{0}'", "expired"),
        (
            "insert into device_schedule (device_id, at, status) values ('{0}', now() + interval '1 second', 'revoked')",
            "revoked",
        ),
    ],
)
async def test_whatever_narrows_a_device_ends_its_connection(
    mqtt: Clients, fleet: Fleet, enforcing: Service, change: str, cause: str
) -> None:
    """Also scheduled changes, on time; a sweep at that moment may be faster than the task."""
    me = fleet.device()
    client = mqtt(me)
    assert await client.connect() == 0
    swept = enforcing.count("authbackend_sweep_ended", cause="device_not_permitted")
    await fleet.change(change.format(me))
    assert await client.disconnected(5) is not None
    task = await done(enforcing, me)
    assert task["causes"] == [cause]
    closed = task["receipt"]["closed"]
    assert closed == {"rabbit@localhost": 1} or (
        closed == {} and enforcing.count("authbackend_sweep_ended", cause="device_not_permitted") > swept
    )


async def test_an_attribute_that_a_rule_uses(mqtt: Clients, fleet: Fleet, enforcing: Service) -> None:
    """A change of an attribute that no rule uses affects nobody."""
    me = fleet.device()
    await fleet.change(
        f'update device set attributes = \'{{"site": "a", "line": "1"}}\' where device_id = \'{me}\';'
        f"insert into topic_rule (device_id, effect, action, topic) values ('{me}', 'allow', 'publish', 'site/{{attr.site}}')"
    )
    client = mqtt(me)
    assert await client.connect() == 0
    await fleet.change(f"update device set attributes = attributes || '{{\"line\": \"2\"}}' where device_id = '{me}'")
    assert await client.alive()
    await fleet.change(f"update device set attributes = attributes || '{{\"site\": \"b\"}}' where device_id = '{me}'")
    assert await client.disconnected(5) is not None


async def test_a_new_device_takes_its_client_ids_from_who_had_them(
    mqtt: Clients, fleet: Fleet, enforcing: Service
) -> None:
    """Connections with such an id end, and the new device does not get the old one's session."""
    me = fleet.device()
    old = mqtt(me, client_id=f"{me}_1", **SESSION)
    assert await old.connect() == 0
    assert await old.subscribe(f"fleet/{me}/commands/#") == [1]
    await fleet.change(f"insert into device (device_id, type) values ('{me}_1', 'APM')")
    assert await old.disconnected(5) is not None
    task = await done(enforcing, f"{me}_1")
    assert [queue["why"] for queue in task["receipt"]["queues_deleted"]] == ["client_id_owner"]
    new = mqtt(f"{me}_1", **SESSION)
    assert await new.connect() == 0
    assert not new.session_present


async def test_an_account_whose_rights_changed(
    certificates: Certificates, broker: Broker, fleet: Fleet, enforcing: Service
) -> None:
    """Its AMQP connection ends; it may reconnect."""
    identity = certificates.device("dispatcher")
    connection = await connect_amqp(identity.context(), port=broker.doors.amqp_tls)
    closed = asyncio.Event()
    connection.close_callbacks.add(lambda *_: closed.set())
    await fleet.change("update account set write = '{amq.topic}' where name = 'dispatcher'")
    async with asyncio.timeout(10):
        await closed.wait()
    task = await done(enforcing, "dispatcher", "account")
    assert task["causes"] == ["rights"]
    await (await connect_amqp(identity.context(), port=broker.doors.amqp_tls)).close()


async def test_a_sweep_finds_what_was_missed_and_what_contradicts(
    mqtt: Clients, fleet: Fleet, enforcing: Service, database: Any
) -> None:
    """A device whose revocation created no task is disconnected; a wrong type claimed with MQTT 5 is reported."""
    me, liar = fleet.device(), fleet.device()
    client = mqtt(me)
    claims = mqtt(liar, user_properties=[("client_type", "AGV"), ("client_name", liar)])
    assert await client.connect() == 0
    assert await claims.connect() == 0
    database.sql(
        f"set session_replication_role = replica; alter table device disable trigger enforcement_u;"
        f"update device set status = 'revoked' where device_id = '{me}'; alter table device enable always trigger enforcement_u"
    )
    assert await client.disconnected(30) is not None
    await until(lambda: enforcing.count("authbackend_sweep_ended", cause="device_not_permitted") >= 1)

    def violations() -> str:
        return enforcing.command("enforcement", "sweeps")

    await until(lambda: "client_type 'AGV', registered: 'APM'" in violations(), 30)
    assert await claims.alive()


async def test_a_broker_that_is_down_is_not_forgotten(
    mqtt: Clients, fleet: Fleet, broker: Broker, enforcing: Service
) -> None:
    """``--wait`` does not report success too early; when the broker is back, the tasks are finished."""
    me = fleet.device()
    client = mqtt(me, **SESSION)
    assert await client.connect() == 0
    await client.subscribe(f"fleet/{me}/commands/#")
    await client.disconnect()
    await asyncio.to_thread(broker.stop)
    try:
        with pytest.raises(HarnessError, match=r"exit status 8(?s:.)*not yet confirmed for existing connections"):
            await asyncio.to_thread(enforcing.command, "device", "revoke", me, "--wait", "--timeout", "3")
        text = enforcing.command("enforcement", "list", "--state", "open")
        assert me in text
        assert "management API" in text
    finally:
        await asyncio.to_thread(broker.start)
    async with asyncio.timeout(60):
        task = await done(enforcing, me)
    assert [queue["queue"] for queue in task["receipt"]["queues_deleted"]] == [f"mqtt-subscription-{me}qos1"]


async def test_a_crash_in_the_middle_loses_nothing(mqtt: Clients, fleet: Fleet, enforcing: Service) -> None:
    """Killed during twenty revocations, the service finishes them after its restart."""
    names = [fleet.device() for _ in range(20)]
    clients = [mqtt(name) for name in names]
    for client in clients:
        assert await client.connect() == 0
    listed = ", ".join(f"'{name}'" for name in names)
    await fleet.change(f"update device set status = 'revoked' where device_id in ({listed})")
    await asyncio.to_thread(enforcing.kill)
    await asyncio.to_thread(enforcing.start)
    for client in clients:
        assert await client.disconnected(30) is not None
    for name in names:
        assert (await done(enforcing, name))["state"] == "done"


async def test_a_revoked_certificate_ends_the_connection_that_uses_it_and_no_other(
    mqtt: Clients, fleet: Fleet, certificates: Certificates, enforcing: Service, tmp_path: Path
) -> None:
    """The device stays connected with its new one; unrecorded certificates are disconnected if the type requires it."""
    me = fleet.device()
    old, new = certificates.device(me), certificates.device(me)
    for each in (old, new):
        enforcing.command("cert", "import", str(each.certificate_file))
    with_old, with_new = mqtt(old), mqtt(new, client_id=f"{me}_2")
    assert await with_old.connect() == 0
    assert await with_new.connect() == 0
    serial = f"{x509.load_pem_x509_certificate(old.certificate_file.read_bytes()).serial_number:x}"
    enforcing.command("cert", "revoke", serial, "--reason", "keyCompromise")
    assert await with_old.disconnected(10) is not None
    await done(enforcing, serial, "certificate")
    assert await with_new.alive()
    unknown = mqtt(certificates.device(me), client_id=f"{me}_3")
    assert await unknown.connect() == 0
    await fleet.change("update device_type set require_known_certificate = true where name = 'APM'")
    try:
        assert await unknown.disconnected(30) is not None
        assert await with_new.alive()
    finally:
        await fleet.change("update device_type set require_known_certificate = false where name = 'APM'")
