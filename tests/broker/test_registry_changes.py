"""Changes of the registry with psql take effect at RabbitMQ's next request."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .fleet import EDITOR, Fleet
from .mqtt import Disconnected, MQTTClient
from .processes import HarnessError

Clients = Callable[..., MQTTClient]
REFUSED, NOBODY_SUBSCRIBED = 0x86, 0x10
SERVICE, READER = "authbackend_service", "authbackend_reader"


async def test_a_revoked_device(mqtt: Clients, fleet: Fleet) -> None:
    """Its next login and its next publish to a new topic are refused; another device is not affected."""
    me, neighbour = fleet.device(), fleet.device()
    client, other = mqtt(me), mqtt(neighbour)
    assert await client.connect() == 0
    assert await other.connect() == 0
    assert await client.publish(f"fleet/{me}/telemetry/1", b"x") == NOBODY_SUBSCRIBED
    await fleet.change(f"update device set status = 'revoked', status_reason = 'stolen' where device_id = '{me}'")
    with pytest.raises(Disconnected):
        await client.publish(f"fleet/{me}/telemetry/2", b"x")
    refused = fleet.service.denials(endpoint="user", reason="device_revoked")
    assert await mqtt(me).connect() == REFUSED
    assert fleet.service.denials(endpoint="user", reason="device_revoked") == refused + 1
    assert await other.publish(f"fleet/{neighbour}/telemetry/1", b"x") == NOBODY_SUBSCRIBED


@pytest.mark.parametrize("owner", ["device", "type"])
async def test_a_deny_rule(mqtt: Clients, fleet: Fleet, owner: str) -> None:
    """For one device or its type: the next publish to that topic is refused, others are not, until it is removed."""
    me = fleet.device()
    topic = f"fleet/{me}/telemetry/secret"
    column, value = ("device_id", me) if owner == "device" else ("device_type", "APM")
    await fleet.change(
        f"insert into topic_rule ({column}, effect, action, topic)"
        f" values ('{value}', 'deny', 'publish', 'fleet/{{device_id}}/telemetry/secret')"
    )
    client = mqtt(me)
    assert await client.connect() == 0
    assert await client.publish(f"fleet/{me}/telemetry/other", b"x") == NOBODY_SUBSCRIBED
    denied = fleet.service.denials(endpoint="topic", reason="rule_denies")
    with pytest.raises(Disconnected):
        await client.publish(topic, b"x")
    assert fleet.service.denials(endpoint="topic", reason="rule_denies") == denied + 1
    await fleet.change("delete from topic_rule where effect = 'deny'")
    again = mqtt(me)
    assert await again.connect() == 0
    assert await again.publish(topic, b"x") == NOBODY_SUBSCRIBED


async def test_a_new_rule_for_a_connected_device(mqtt: Clients, fleet: Fleet) -> None:
    """A new allow rule takes effect without a reconnect."""
    me = fleet.device()
    client = mqtt(me)
    assert await client.connect() == 0
    await fleet.change(
        f"insert into topic_rule (device_id, effect, action, topic) values ('{me}', 'allow', 'publish', 'new/#')"
    )
    assert await client.publish("new/x", b"x") == NOBODY_SUBSCRIBED


async def test_a_new_device_logs_in(mqtt: Clients, fleet: Fleet) -> None:
    """One INSERT is enough; the common name defaults to the device id."""
    await fleet.change("insert into device (device_id, type) values ('PSQL-1', 'APM')")
    assert await mqtt("PSQL-1").connect() == 0


@pytest.mark.parametrize(
    ("topic", "fault"),
    [
        ("", "it is empty"),
        ("fleet/#/x", "only as the last level"),
        ("fleet/a+/x", "only as a whole level, not inside a+"),
        ("fleet/*/x", '"*" is not possible in a rule'),
        ("fleet/{device}/x", "the placeholder {device} is unknown; there are {device_id}"),
        ("fleet/{device_id/x", "a brace is unbalanced"),
    ],
)
async def test_a_broken_rule_is_refused_with_its_fault(mqtt: Clients, fleet: Fleet, topic: str, fault: str) -> None:
    """The error says what is wrong; nothing is stored, and the device's old rules stay in effect."""
    me = fleet.device()
    statement = (
        f"insert into topic_rule (device_id, effect, action, topic) values ('{me}', 'deny', 'publish', '{topic}')"
    )
    with pytest.raises(HarnessError) as refusal:
        await fleet.change(statement)
    assert fault in str(refusal.value)
    assert fleet.database.sql(f"select count(*) from topic_rule where device_id = '{me}'") == "0"
    client = mqtt(me)
    assert await client.connect() == 0
    assert await client.publish(f"fleet/{me}/telemetry/x", b"x") == NOBODY_SUBSCRIBED


@pytest.mark.parametrize(
    ("statement", "fault"),
    [
        ("insert into device (device_id, type) values ('a/b', 'APM')", "1 to 64 letters"),
        ("insert into device (device_id, type, common_name) values ('AB', 'APM', '/:APM0001')", '":" is not possible'),
        ("insert into device (device_id, type, common_name) values ('AB', 'APM', 'A,B')", '"," is not possible'),
        ("insert into device (device_id, type) values ('monitoring', 'APM')", "has the common name of device"),
        ("insert into account (name, login) values ('APM0001', 'password')", "has the common name of device"),
        (
            "insert into account (name, login, client_ids) values ('x', 'certificate', '{APM0001_x}')",
            "belongs to device 'APM0001'",
        ),
        ("update device_type set client_ids = '{*}' where name = 'APM'", "it must begin with {device_id}"),
        ("update device set status = 'gone' where device_id = 'APM0001'", "possible are pending, active"),
    ],
)
async def test_a_row_that_would_let_one_be_another_is_refused(fleet: Fleet, statement: str, fault: str) -> None:
    """No name or client id can belong to two devices or accounts."""
    with pytest.raises(HarnessError) as refusal:
        fleet.database.sql(statement, EDITOR)
    assert fault in str(refusal.value)


@pytest.mark.parametrize(
    ("role", "statement"),
    [
        (EDITOR, "truncate topic_rule"),
        (EDITOR, "truncate device cascade"),
        (EDITOR, "update audit set actor = 'somebody else'"),
        (EDITOR, "delete from audit"),
        (EDITOR, "insert into audit (operation, entity) values ('INSERT', 'device')"),
        (EDITOR, "alter table device disable trigger all"),
        (EDITOR, "drop trigger audit_u on device"),
        (EDITOR, "alter table device drop constraint device_id_form"),
        (EDITOR, "create or replace function refuse(fault text) returns boolean language sql as 'select true'"),
        (EDITOR, "set session_replication_role = replica"),
        (EDITOR, "insert into change default values"),
        (SERVICE, "truncate device cascade"),
        (SERVICE, "update device set status = 'active'"),
        (SERVICE, "delete from audit"),
        (SERVICE, "alter table device disable trigger all"),
        (READER, "select password_hash from account"),
        (READER, "update device set status = 'active'"),
    ],
)
async def test_what_a_role_may_not(fleet: Fleet, role: str, statement: str) -> None:
    """The roles of sql/roles.sql can bypass neither the registry's constraints nor the audit trail."""
    before = fleet.database.sql("select count(*), max(id) from audit")
    with pytest.raises(HarnessError, match=r"permission denied|must be owner|append-only"):
        fleet.database.sql(statement, role)
    assert fleet.database.sql("select count(*), max(id) from audit") == before


async def test_even_the_owner_cannot_edit_the_trail(fleet: Fleet) -> None:
    """As long as the trigger exists, an UPDATE of the trail is refused for every role."""
    with pytest.raises(HarnessError, match="append-only"):
        fleet.database.sql("update audit set actor = 'somebody else'")


async def test_who_changed_what_is_on_record(fleet: Fleet) -> None:
    """The role that logged in; with the command also the reason, and the actor that the client claims."""
    me = fleet.device()
    await fleet.change(f"update device set status = 'suspended' where device_id = '{me}'")
    await fleet.command("device", "revoke", me, "--reason", "stolen")
    rows = fleet.database.sql(
        "select actor, operation, before ->> 'status', after ->> 'status', after ->> 'status_reason', claimed_by is not null from audit"
        f" where entity = 'device' and key = '{me}' order by id offset 1",
        READER,
    )
    assert rows.splitlines() == [
        f"{EDITOR}|UPDATE|active|suspended||f",
        f"{EDITOR}|UPDATE|suspended|revoked|stolen|t",
    ]
