"""Every change that narrows leaves work behind in its own transaction, whoever makes it; one that does not leaves none."""

from __future__ import annotations

import asyncio
import json

import asyncpg
import pytest

from authbackend.postgres.connection import Target
from authbackend.postgres.enforcement import enforced, leading
from tests.postgres.test_roles import ADMIN, give_roles
from tests.support.postgres import Server, connected
from tests.support.registry import Following, fleet

SETUP = """
insert into enforcement_setup (hold_limit_s) values (30);
insert into device_type (name, client_ids, vhosts) values ('T', '{"{device_id}_*"}', '{/}'), ('U', array['{device_id}'], '{/}');
insert into device (device_id, type, attributes) values ('A', 'T', '{"site": "a", "line": "1"}'), ('B', 'T', '{}');
insert into device (device_id, type, status) values ('R', 'T', 'revoked');
insert into account (name, login, vhosts, write) values ('svc', 'certificate', '{/,v}', '{a}');
insert into topic_rule (device_type, effect, action, topic) values ('T', 'allow', 'publish', 'p/{attr.site}'), ('T', 'deny', 'subscribe', 'no');
insert into topic_rule (device_id, effect, action, topic) values ('A', 'allow', 'subscribe', 'own');
insert into topic_rule (account, effect, action, topic) values ('svc', 'allow', 'subscribe', 'x');
delete from enforcement; delete from device_hold;
"""


@pytest.fixture
async def work(scratch: asyncpg.Connection) -> asyncpg.Connection:
    """A registry in which enforcement is on, inside a transaction."""
    await scratch.execute(SETUP)
    return scratch


async def noted(connection: asyncpg.Connection) -> list[tuple[str, str, list[str]]]:
    rows = await connection.fetch("select kind, name, causes from enforcement order by kind, name, causes")
    return [(row["kind"], row["name"], row["causes"]) for row in rows]


async def held(connection: asyncpg.Connection) -> list[str]:
    return [row["device_id"] for row in await connection.fetch("select device_id from device_hold order by 1")]


@pytest.mark.parametrize(
    ("change", "expected", "holds"),
    [
        ("update device set status = 'revoked' where device_id = 'A'", [("device", "A", ["revoked"])], []),
        (
            "update device set status = 'suspended'",
            [("device", "A", ["suspended"]), ("device", "B", ["suspended"])],
            [],
        ),
        ("update device set status = 'active' where device_id = 'R'", [], []),
        ("delete from device where device_id = 'A'", [("device", "A", ["deleted"])], []),
        ("delete from device where device_id = 'R'", [], []),
        ("update device set common_name = 'x' where device_id = 'A'", [("device", "A", ["renamed"])], ["A"]),
        ("update device set type = 'U' where device_id = 'A'", [("device", "A", ["retyped"])], ["A"]),
        ("update device set device_id = 'Z' where device_id = 'A'", [("device", "A", ["deleted"])], []),
        ("update device set attributes = attributes || '{\"line\": \"2\"}' where device_id = 'A'", [], []),
        (
            "update device set attributes = attributes || '{\"site\": \"b\"}' where device_id = 'A'",
            [("device", "A", ["attributes"])],
            ["A"],
        ),
        ("update device set attributes = '{}' where device_id = 'A'", [("device", "A", ["attributes"])], ["A"]),
        ("update device set expires_at = now() where device_id = 'A'", [("device", "A", ["expired"])], []),
        ("update device set expires_at = now() + interval '1 h' where device_id = 'A'", [], []),
        ("update device set status_reason = 'x'", [], []),
        ("insert into device (device_id, type) values ('C', 'T')", [], []),
        ("insert into device (device_id, type) values ('A_1', 'T')", [("device", "A_1", ["client_id_owner"])], ["A_1"]),
        (
            "update device set device_id = 'A-2', common_name = 'A-2' where device_id = 'B'",
            [("device", "A-2", ["client_id_owner"]), ("device", "B", ["deleted"])],
            ["A-2"],
        ),
        ("update device_type set vhosts = '{/,v}' where name = 'T'", [], []),
        ("update device_type set vhosts = '{v}' where name = 'T'", [("device_type", "T", ["vhosts"])], []),
        ("update device_type set client_ids = '{}' where name = 'T'", [("device_type", "T", ["client_ids"])], []),
        ("update device_type set networks = '{10.0.0.0/8}' where name = 'T'", [("device_type", "T", ["networks"])], []),
        ("update device_type set description = 'x'", [], []),
        (
            "update device_type set name = 'V' where name = 'T'",
            [("device_type", "V", ["renamed"]), ("device_type", "V", ["rules"])],
            [],
        ),
        ("delete from topic_rule where device_type = 'T' and effect = 'allow'", [("device_type", "T", ["rules"])], []),
        ("delete from topic_rule where device_type = 'T' and effect = 'deny'", [], []),
        ("insert into topic_rule (device_type, effect, action, topic) values ('T', 'allow', 'publish', 'new')", [], []),
        (
            "insert into topic_rule (device_id, effect, action, topic) values ('A', 'deny', 'publish', 'new')",
            [("device", "A", ["rules"])],
            ["A"],
        ),
        ("insert into topic_rule (device_id, effect, action, topic) values ('R', 'deny', 'publish', 'new')", [], []),
        ("update topic_rule set topic = 'other' where device_id = 'A'", [("device", "A", ["rules"])], ["A"]),
        ("update topic_rule set note = 'x'", [], []),
        ("update topic_rule set effect = 'allow' where effect = 'deny'", [], []),
        ("update topic_rule set effect = 'deny' where device_id = 'A'", [("device", "A", ["rules"])], ["A"]),
        ("delete from topic_rule where account = 'svc'", [("account", "svc", ["rules"])], []),
        ("update account set tags = '{monitoring}'", [("account", "svc", ["tags"])], []),
        ("update account set vhosts = '{/}'", [("account", "svc", ["vhosts"])], []),
        ("update account set vhosts = '{/,v,w}'", [], []),
        ("update account set write = '{b}'", [("account", "svc", ["rights"])], []),
        ("update account set login = 'password'", [("account", "svc", ["password"])], []),
        ("delete from account", [("account", "svc", ["deleted"])], []),
    ],
)
async def test_what_a_change_notes(
    work: asyncpg.Connection, change: str, expected: list[tuple[str, str, list[str]]], holds: list[str]
) -> None:
    await work.execute(change)
    assert await noted(work) == expected
    assert await held(work) == holds


async def test_what_the_old_row_knew_is_kept(work: asyncpg.Connection) -> None:
    await work.execute(
        "update device set common_name = 'new' where device_id = 'A'; delete from device where device_id = 'A'"
    )
    details = [json.loads(row["details"]) for row in await work.fetch("select details from enforcement order by id")]
    assert [each["common_name"] for each in details] == ["A", "new"]
    assert details[1]["client_ids"] == ["{device_id}_*"]


async def test_the_rules_that_went_and_came_are_kept_together(work: asyncpg.Connection) -> None:
    await work.execute("update topic_rule set topic = topic || '/x' where device_type = 'T'")
    (row,) = await work.fetch("select details from enforcement")
    assert json.loads(row["details"])["rules"] == [
        {"effect": "allow", "action": "publish", "topic": "p/{attr.site}"},
        {"effect": "deny", "action": "subscribe", "topic": "no/x"},
    ]


async def test_nothing_is_noted_and_nobody_held_where_nobody_enforces(work: asyncpg.Connection) -> None:
    await work.execute("delete from enforcement_setup")
    await work.execute("update device set common_name = device_id || 'x'; delete from topic_rule; delete from account")
    assert await noted(work) == []
    assert await held(work) == []


async def test_also_with_session_replication_role_replica(work: asyncpg.Connection) -> None:
    await work.execute(
        "set local session_replication_role = replica; update device set status = 'revoked' where device_id = 'A'"
    )
    assert await noted(work) == [("device", "A", ["revoked"])]


async def test_an_expiry_is_noted_once_when_its_time_has_come(work: asyncpg.Connection) -> None:
    await work.execute("select enforcement_note_expired()")
    await work.execute("update device set expires_at = clock_timestamp() + interval '20 ms' where device_id = 'A'")
    await work.execute("select enforcement_note_expired()")
    assert await noted(work) == []
    await work.execute("select pg_sleep(0.03)")
    await work.execute("select enforcement_note_expired(); select enforcement_note_expired()")
    assert await noted(work) == [("device", "A", ["expired"])]


async def test_what_is_scheduled_happens_in_the_name_of_who_scheduled_it(work: asyncpg.Connection) -> None:
    await work.execute("set local authbackend.actor = 'ann'")
    await work.execute(
        "insert into device_schedule (device_id, at, status, reason) values ('A', now() - interval '1 s', 'revoked', 'lost'), ('B', now() + interval '1 h', 'revoked', '')"
    )
    await work.execute("set local authbackend.actor = ''; select device_schedule_apply()")
    rows = await work.fetch(
        "select device_id, status, status_reason from device where device_id in ('A', 'B') order by 1"
    )
    assert [tuple(row) for row in rows] == [("A", "revoked", "lost"), ("B", "active", "")]
    assert (
        await work.fetchval("select actor from audit where entity = 'device' and key = 'A' order by id desc limit 1")
        == "ann"
    )
    assert await work.fetchval("select count(*) from device_schedule") == 1


async def test_the_end_of_a_suspension_does_not_reinstate_who_was_revoked_meanwhile(work: asyncpg.Connection) -> None:
    await work.execute(
        "insert into device_schedule (device_id, at, status) values ('R', now() - interval '1 s', 'active')"
    )
    await work.execute("select device_schedule_apply()")
    assert await work.fetchval("select status from device where device_id = 'R'") == "revoked"


async def test_a_hold_is_part_of_the_copy_and_ends_by_itself(connection: asyncpg.Connection, dsn: str) -> None:
    """The record carries when it ends, so that it ends also while the database is away."""
    await fleet(connection, 3)
    await connection.execute("insert into enforcement_setup (hold_limit_s) values (30)")
    follower = Following(dsn)
    await follower.copy.refresh()
    device_id = await connection.fetchval("select device_id from device limit 1")
    assert follower.device(device_id).held_until is None
    await connection.execute("select enforcement_hold($1)", [device_id])
    await follower.copy.refresh()
    now = await connection.fetchval("select extract(epoch from clock_timestamp())::float8")
    assert 25 < follower.device(device_id).held_until - now < 31
    await connection.execute("delete from device_hold")
    await follower.copy.refresh()
    assert follower.device(device_id).held_until is None
    await follower.feed.close()


async def test_one_leads_and_another_takes_over_when_its_connection_is_gone(
    connection: asyncpg.Connection, dsn: str
) -> None:
    target = Target(dsn)
    order: list[str] = []
    async with leading(target, 30) as first:

        async def second() -> None:
            async with leading(target, 30):
                order.append("second")

        waiting = asyncio.create_task(second())
        async with connected(dsn) as connection:
            await connection.execute("update device set status = status")
            assert order == []
            await connection.execute(
                "select pg_terminate_backend(pid) from pg_locks where locktype = 'advisory' and objid = 724003 and granted"
            )
        async with asyncio.timeout(10):
            await waiting
        assert order == ["second"]
        with pytest.raises(Exception, match="lock|reached|connection"):
            await first.record_due()


async def test_small_changes_come_before_mass_changes(connection: asyncpg.Connection, dsn: str) -> None:
    await fleet(connection, 60)
    async with leading(Target(dsn), 30) as work:
        ids = [row["device_id"] for row in await connection.fetch("select device_id from device order by 1")]
        await connection.execute("update device set status = 'revoked' where device_id = any ($1)", ids[:-1])
        await connection.execute("update device set status = 'revoked' where device_id = $1", ids[-1])
        assert (await work.due(1))[0].name == ids[-1]


async def test_a_hold_that_a_later_change_took_again_is_not_released(connection: asyncpg.Connection, dsn: str) -> None:
    await fleet(connection, 2)
    async with leading(Target(dsn), 30) as work:
        name = await connection.fetchval("select device_id from device limit 1")
        insert = "insert into topic_rule (device_id, effect, action, topic) values ($1, 'deny', 'publish', $2)"
        await connection.execute(insert, name, "a")
        (task,) = await work.due(10)
        await connection.execute(insert, name, "b")
        await work.finish({task.id: {}})
        await work.release([name], [task.id])
        assert await held(connection) == [name]
        (other,) = await work.due(10)
        await work.finish({other.id: {}})
        await work.release([name], [other.id])
        assert await held(connection) == []


async def test_waiting_for_a_version_tells_nobody_enforces_apart_from_nothing_to_do(
    connection: asyncpg.Connection, dsn: str
) -> None:
    await fleet(connection, 1)
    target = Target(dsn)
    async with connected(dsn) as connection:
        revoke = "update device set status = 'revoked' returning pg_current_xact_id()::text"
        assert await enforced(target, await connection.fetchval("select pg_current_xact_id()::text"), 1) is None
        await connection.execute("insert into enforcement_setup (hold_limit_s) values (30)")
        assert await enforced(target, await connection.fetchval("select pg_current_xact_id()::text"), 1) == []
        version = await connection.fetchval(revoke)
        (task,) = await enforced(target, version, 0.1) or ()
        assert (task["state"], task["causes"]) == ("waiting", ["revoked"])


async def test_the_security_team_can_look_and_retry_and_nothing_else(
    connection: asyncpg.Connection, postgres: Server, database: str
) -> None:
    give_roles(postgres, database)
    await fleet(connection, 1)
    await connection.execute("insert into enforcement_setup (hold_limit_s) values (30)")
    await connection.execute("update device set status = 'revoked'")
    async with connected(postgres.dsn(database, ADMIN)) as admin:
        assert await admin.fetchval("select count(*) from enforcement") == 1
        await admin.execute("update enforcement set due_at = now()")
        for forbidden in (
            "delete from enforcement",
            "insert into device_hold values ('x', now(), now())",
            "select enforcement_hold('{x}')",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await admin.execute(forbidden)


async def test_receipts_go_after_a_month_whatever_order_they_were_finished_in(
    connection: asyncpg.Connection, dsn: str
) -> None:
    """A task that was done again lately outlives the one on whose behalf it was noted."""
    await fleet(connection, 1)
    async with leading(Target(dsn), 30) as work:
        await connection.execute("update device_type set vhosts = '{}'")
        (parent,) = await work.due(10)
        await work.add(parent, {"d1": {}})
        (child,) = [task for task in await work.due(10) if task.parent]
        await work.finish({parent.id: {}, child.id: {}})
        await connection.execute(
            "update enforcement set finished_at = now() - interval '31 days' where id = $1", parent.id
        )
        await work.keep_sweep("c", {})
        assert [row["id"] for row in await connection.fetch("select id from enforcement")] == [child.id]
