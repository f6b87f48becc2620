"""Every change that takes something away creates tasks in its own transaction, whoever makes it; other changes create none."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from authbackend.enforcement.tasks import MASS, SMALL, URGENT, Task, TaskStoreError
from authbackend.errors import Unavailable
from authbackend.postgres.connection import Target
from authbackend.postgres.enforcement import PostgresTaskStore, enforced, leading, open_store
from authbackend.postgres.statements import load_statements
from tests.postgres.test_roles import ADMIN, give_roles
from tests.support.postgres import Server, connected
from tests.support.registry import Following, fleet

ENABLED = (
    "insert into enforcement_setup (hold_limit_s) values (30); insert into enforcement_cluster (name) values ('c')"
)
SETUP = """
insert into enforcement_setup (hold_limit_s) values (30);
insert into enforcement_cluster (name) values ('c');
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
    """A registry with enforcement switched on, in a transaction."""
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
        (
            "update device_type set client_ids = client_ids || '{device_id}-*'::text where name = 'T'",
            [("device_type", "T", ["client_id_owner"])],
            [],
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


async def test_a_device_whose_new_type_has_wider_patterns_may_take_client_ids(work: asyncpg.Connection) -> None:
    await work.execute(
        "insert into device (device_id, type) values ('A_1', 'U'); delete from enforcement; delete from device_hold"
    )
    await work.execute("update device set type = 'T' where device_id = 'A_1'")
    assert await noted(work) == [("device", "A_1", ["client_id_owner"]), ("device", "A_1", ["retyped"])]
    row = await work.fetchrow("select details from enforcement where causes = '{client_id_owner}'")
    assert json.loads(row["details"]) == {"common_name": "A_1", "users": ["A"], "former_client_ids": ["{device_id}"]}


async def test_patterns_before_the_first_of_several_changes_are_kept(work: asyncpg.Connection) -> None:
    """Client ids that fitted before the first change stay usable; all that fit since are held until they have been checked."""
    widen = "update device_type set client_ids = client_ids || $1::text where name = 'T'"
    await work.execute(widen, "{device_id}-*")
    await work.execute("update client_id_move set held = '{x}'")
    await work.execute(widen, "{device_id}_x-*")
    row = await work.fetchrow("select device_type, former, held from client_id_move")
    assert tuple(row) == ("T", ["{device_id}_*"], None)


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
    for seconds in (0.02, 0.2, 2.0, 20.0):  # longer each time, because the machine may be busy
        attempt = work.transaction()
        await attempt.start()
        expiry = "update device set expires_at = clock_timestamp() + $1 where device_id = 'A'"
        await work.execute(expiry, timedelta(seconds=seconds))
        await work.execute("select enforcement_note_expired()")
        if await work.fetchval("select clock_timestamp() < expires_at from device where device_id = 'A'"):
            break
        await attempt.rollback()
    assert await noted(work) == []
    await work.execute("select pg_sleep_until(expires_at) from device where device_id = 'A'")
    await work.execute("select enforcement_note_expired(); select enforcement_note_expired()")
    assert await noted(work) == [("device", "A", ["expired"])]


async def test_an_expiry_that_a_change_noted_is_not_noted_again_by_the_time(work: asyncpg.Connection) -> None:
    await work.execute("select enforcement_note_expired()")
    await work.execute("update device set expires_at = clock_timestamp() where device_id = 'A'")
    await work.execute("select enforcement_note_expired()")
    assert await noted(work) == [("device", "A", ["expired"])]


async def test_what_is_scheduled_happens_in_the_name_of_who_scheduled_it(work: asyncpg.Connection) -> None:
    await work.execute("set local authbackend.actor = 'ann'")
    await work.execute(
        "insert into device_schedule (device_id, at, status, reason) values ('A', now() - interval '1 s', 'revoked', 'lost'), ('B', now() + interval '1 h', 'revoked', '')"
    )
    await work.execute("set local authbackend.actor = ''; select made from device_schedule_apply()")
    rows = await work.fetch(
        "select device_id, status, status_reason from device where device_id in ('A', 'B') order by 1"
    )
    assert [tuple(row) for row in rows] == [("A", "revoked", "lost"), ("B", "active", "")]
    assert (
        await work.fetchval(
            "select claimed_by from audit where entity = 'device' and key = 'A' order by id desc limit 1"
        )
        == "ann"
    )
    assert await work.fetchval("select count(*) from device_schedule") == 1


async def test_the_end_of_a_suspension_does_not_reinstate_who_was_revoked_meanwhile(work: asyncpg.Connection) -> None:
    await work.execute(
        "insert into device_schedule (device_id, at, status) values ('R', now() - interval '1 s', 'active')"
    )
    await work.execute("select made from device_schedule_apply()")
    assert await work.fetchval("select status from device where device_id = 'R'") == "revoked"


async def test_a_hold_is_part_of_the_copy_and_ends_by_itself(connection: asyncpg.Connection, dsn: str) -> None:
    """The record contains its end, so that it ends even while the database is unreachable."""
    await fleet(connection, 3)
    await connection.execute(ENABLED)
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


@contextlib.asynccontextmanager
async def tasks_of(dsn: str) -> AsyncIterator[PostgresTaskStore]:
    """Switch enforcement on for the cluster ``c``, and yield its task store."""
    async with leading(Target(dsn), 30, ["c"]), open_store(Target(dsn), "test") as store:
        yield store


async def every(store: PostgresTaskStore, limit: int = 10) -> list[Task]:
    """Return the due tasks of all lanes."""
    return [task for lane in (URGENT, SMALL, MASS) for task in await store.due("c", lane, set(), limit)]


async def test_one_leads_and_another_takes_over_when_its_connection_is_gone(
    connection: asyncpg.Connection, dsn: str
) -> None:
    target = Target(dsn)
    order: list[str] = []
    async with leading(target, 30, ["c"]) as first:

        async def second() -> None:
            async with leading(target, 30, ["c"]):
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
        with pytest.raises(Unavailable, match="connection that holds the lock"):
            await first.lost()


async def test_a_store_says_that_it_is_lost(connection: asyncpg.Connection, dsn: str) -> None:
    async with tasks_of(dsn) as store:
        await connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name like '%enforcement test'"
        )
        with pytest.raises(TaskStoreError):
            await store.record_due()
        with pytest.raises(TaskStoreError, match="connection to PostgreSQL was lost"):
            await store.wait_for_tasks(1)


REVOKE = "update device set status = 'revoked' where device_id = any ($1)"


@pytest.mark.parametrize(
    ("statements", "lanes"),
    [
        (["update device set status = 'revoked' where device_id = 'd1'"], {"d1": "urgent"}),
        (["update device set status = 'suspended' where device_id = 'd1'"], {"d1": "urgent"}),
        (["delete from device where device_id = 'd1'"], {"d1": "urgent"}),
        (["update device set expires_at = now() where device_id = 'd1'"], {"d1": "urgent"}),
        (["delete from account"], {"robot": "urgent"}),
        (["update device set common_name = 'x' where device_id = 'd1'"], {"d1": "small"}),
        (["update account set tags = '{monitoring}'"], {"robot": "small"}),
        (["delete from topic_rule where device_type is not null"], {"agv": "small"}),
        (
            [
                "update device set status = 'revoked' where device_id = 'd1'",
                "delete from topic_rule where device_type is not null",
            ],
            {"d1": "urgent", "agv": "small"},
        ),
    ],
)
async def test_the_lane_of_a_small_change(
    connection: asyncpg.Connection, dsn: str, statements: list[str], lanes: dict[str, str]
) -> None:
    await fleet(connection, 3)
    async with tasks_of(dsn), connection.transaction():
        for statement in statements:
            await connection.execute(statement)
    rows = await connection.fetch("select name, lane from enforcement")
    assert {row["name"]: row["lane"] for row in rows} == lanes


@pytest.mark.parametrize("each", [1, 7, 30])
async def test_twenty_one_identities_in_a_transaction_are_a_mass_change_however_it_is_written(
    connection: asyncpg.Connection, dsn: str, each: int
) -> None:
    await fleet(connection, 41)
    ids = [f"d{n}" for n in range(1, 22)]
    async with tasks_of(dsn):
        async with connection.transaction():
            for start in range(0, 20, each):
                await connection.execute(REVOKE, ids[:-1][start : start + each])
            assert await lanes(connection) == {"urgent": 20}
            await connection.execute(REVOKE, ids[-1:])
            assert await lanes(connection) == {"mass": 21}
        await connection.execute(REVOKE, [f"d{n}" for n in range(22, 42)])
        assert await lanes(connection) == {"mass": 21, "urgent": 20}


async def lanes(connection: asyncpg.Connection) -> dict[str, int]:
    rows = await connection.fetch("select lane, count(*) from enforcement group by lane")
    return {row["lane"]: row["count"] for row in rows}


async def test_each_cluster_has_tasks_of_its_own(connection: asyncpg.Connection, dsn: str) -> None:
    await fleet(connection, 21)
    async with leading(Target(dsn), 30, ["a", "b"]):
        await connection.execute(REVOKE, [f"d{n}" for n in range(1, 21)])
        await connection.execute("update device set common_name = 'x' where device_id = 'd21'")
        rows = await connection.fetch("select cluster, lane, count(*) from enforcement group by 1, 2 order by 1, 2")
        assert [tuple(row) for row in rows] == [
            ("a", "small", 1),
            ("a", "urgent", 20),
            ("b", "small", 1),
            ("b", "urgent", 20),
        ]
        assert await held(connection) == ["d21"]


async def test_fetching_reads_no_more_than_it_returns_however_much_is_open(
    connection: asyncpg.Connection, dsn: str
) -> None:
    """With 200,000 open tasks, the query plan is an index scan that reads no row in vain."""
    await fleet(connection, 100)
    async with tasks_of(dsn) as store:
        await connection.execute(
            "alter table enforcement disable trigger lane;"
            "insert into enforcement (cluster, kind, name, causes, lane, due_at)"
            " select 'c', 'device', 'd' || n, '{revoked}', case n % 1000 when 0 then 'small' else 'mass' end, clock_timestamp() + (n % 3 - 2) * interval '1 hour'"
            " from generate_series(1, 200000) n; analyze enforcement"
        )
        await connection.execute(REVOKE, ["d1"])
        sql = load_statements("enforcement").due.sql
        for lane, limit in (("urgent", 50), ("small", 50), ("mass", 5000)):
            for _ in range(2):  # a second time, for the cached plan
                (text,) = await connection.fetchrow("explain (analyze, format json) " + sql, "c", lane, [], limit)
            found = list(scans(json.loads(text)[0]["Plan"], "enforcement"))
            assert found, text
            for scan in found:
                assert scan["Node Type"].startswith("Index"), scan
                assert scan.get("Rows Removed by Filter", 0) == 0
                assert scan["Actual Rows"] <= limit
        assert len(await store.due("c", MASS, set(), 5000)) == 5000


def scans(plan: dict[str, Any], table: str) -> Iterator[dict[str, Any]]:
    if plan.get("Relation Name") == table:
        yield plan
    for child in plan.get("Plans", ()):
        yield from scans(child, table)


async def test_a_single_revocation_does_not_queue_behind_a_mass_change(
    connection: asyncpg.Connection, dsn: str
) -> None:
    await fleet(connection, 60)
    async with tasks_of(dsn) as store:
        ids = [row["device_id"] for row in await connection.fetch("select device_id from device order by 1")]
        await connection.execute(REVOKE, ids[:-1])
        await connection.execute(REVOKE, ids[-1:])
        assert [task.name for task in await store.due("c", URGENT, set(), 10)] == ids[-1:]
        assert len(await store.due("c", MASS, set(), 100)) == 59


async def test_a_hold_that_a_later_change_took_again_is_not_released(connection: asyncpg.Connection, dsn: str) -> None:
    await fleet(connection, 2)
    async with tasks_of(dsn) as work:
        name = await connection.fetchval("select device_id from device limit 1")
        insert = "insert into topic_rule (device_id, effect, action, topic) values ($1, 'deny', 'publish', $2)"
        await connection.execute(insert, name, "a")
        (task,) = await every(work)
        await connection.execute(insert, name, "b")
        await work.finish({task.id: {}})
        await work.release([name], [task.id])
        assert await held(connection) == [name]
        (other,) = await every(work)
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
        await connection.execute(ENABLED)
        assert await enforced(target, await connection.fetchval("select pg_current_xact_id()::text"), 1) == []
        version = await connection.fetchval(revoke)
        (task,) = await enforced(target, version, 0.1) or ()
        assert (task["state"], task["causes"]) == ("waiting", ["revoked"])


async def test_the_security_team_can_look_and_retry_and_nothing_else(
    connection: asyncpg.Connection, postgres: Server, database: str
) -> None:
    give_roles(postgres, database)
    await fleet(connection, 1)
    await connection.execute(ENABLED)
    await connection.execute("update device set status = 'revoked'")
    async with connected(postgres.dsn(database, ADMIN)) as admin:
        assert await admin.fetchval("select count(*) from enforcement") == 1
        assert await admin.fetchval("select enforcement_retry(null)") == 1
        for forbidden in (
            "update enforcement set due_at = now()",
            "delete from enforcement",
            "insert into device_hold values ('x', now(), now())",
            "select enforcement_hold('{x}')",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await admin.execute(forbidden)


async def test_receipts_go_after_a_month_whatever_order_they_were_finished_in(
    connection: asyncpg.Connection, dsn: str
) -> None:
    """A child that was done again recently keeps its parent from being deleted."""
    await fleet(connection, 1)
    async with tasks_of(dsn) as work:
        await connection.execute("update device_type set vhosts = '{}'")
        (parent,) = await every(work)
        await work.add(parent, {"d1": {}})
        (child,) = [task for task in await every(work) if task.parent]
        await work.finish({parent.id: {}, child.id: {}})
        old = "update enforcement set finished_at = now() - interval '31 days' where id = $1"
        await connection.execute(old, parent.id)
        await work.forget_done()
        assert await connection.fetchval("select count(*) from enforcement") == 2
        await connection.execute(old, child.id)
        async with connected(dsn) as somebody, somebody.transaction():
            await somebody.execute("select from enforcement where id = $1 for update", child.id)
            await work.forget_done()  # does not wait for the lock
        await work.forget_done()
        await work.forget_done()
        assert await connection.fetchval("select count(*) from enforcement") == 0


@pytest.mark.parametrize(("after_s", "earliest", "latest"), [(0.3, 0.3, 0.3), (2.0, 2.0, 2.5), (6.0, 6.0, 6.5)])
async def test_a_further_look_is_due_at_a_half_second_so_that_many_are_made_together(
    connection: asyncpg.Connection, dsn: str, after_s: float, earliest: float, latest: float
) -> None:
    await fleet(connection, 1)
    async with tasks_of(dsn) as store:
        await connection.execute(REVOKE, ["d1"])
        (task,) = await every(store)
        before = await connection.fetchval("select extract(epoch from clock_timestamp())::float8")
        await store.check_later({task.id: {}}, after_s)
        after = await connection.fetchval("select extract(epoch from clock_timestamp())::float8")
        due = await connection.fetchval("select extract(epoch from due_at)::float8 from enforcement")
    assert before + earliest <= due <= after + latest
    assert after_s < 1 or due * 2 == int(due * 2)
