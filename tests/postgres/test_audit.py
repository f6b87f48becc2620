"""The audit trail records every change of the registry: who, when, before and after, and never a password hash."""

from __future__ import annotations

import json
from typing import Any

import asyncpg
import pytest

from authbackend.postgres import registry_edits
from authbackend.postgres.connection import Target
from tests.postgres.test_constraints import HASH
from tests.support.postgres import Server, connected

OTHER_HASH = HASH.replace("RdescudvJCsgt3ub", "SdescudvJCsgt3ub")


async def trail(connection: asyncpg.Connection, entity: str) -> list[dict[str, Any]]:
    """Return the trail of an entity, oldest first."""
    rows = await connection.fetch("select * from audit where entity = $1 order by id", entity)
    return [
        {
            **row,
            "before": row["before"] and json.loads(row["before"]),
            "after": row["after"] and json.loads(row["after"]),
        }
        for row in rows
    ]


async def add_devices(connection: asyncpg.Connection, number: int = 1) -> None:
    await connection.execute("insert into device_type (name) values ('agv') on conflict do nothing")
    await connection.execute(
        "insert into device (device_id, type) select 'd' || n, 'agv' from generate_series(1, $1) n", number
    )


async def test_a_change_is_told_with_who_what_when_and_version(dsn: str, connection: asyncpg.Connection) -> None:
    await add_devices(connection)
    await connection.execute("create role auditor login")
    await connection.execute("grant select, update on device to auditor")
    async with connected(dsn, user="auditor", server_settings={"application_name": "the-app"}) as session:
        async with session.transaction():
            before = await session.fetchval("select clock_timestamp()")
            await session.execute("set local authbackend.actor = 'ann@example'")
            await session.execute("update device set status = 'revoked', status_reason = 'stolen'")
            version = await session.fetchval("select pg_current_xact_id()::text")
    row = (await trail(connection, "device"))[-1]
    assert (row["role"], row["actor"], row["claimed_by"], row["application"]) == (
        "auditor",
        "auditor",
        "ann@example",
        "the-app",
    )
    assert (row["operation"], row["key"], str(row["version"])) == ("UPDATE", "d1", version)
    assert before <= row["at"] <= await connection.fetchval("select clock_timestamp()")
    assert (row["before"]["status"], row["before"]["status_reason"]) == ("active", "")
    assert (row["after"]["status"], row["after"]["status_reason"]) == ("revoked", "stolen")
    assert row["before"]["type"] == row["after"]["type"] == "agv"
    await connection.execute("drop owned by auditor")
    await connection.execute("drop role auditor")


async def test_the_actor_of_one_transaction_is_not_that_of_the_next(scratch: asyncpg.Connection, dsn: str) -> None:
    target = Target(dsn)
    async with connected(dsn) as connection:
        await connection.execute("insert into device_type (name) values ('agv')")
        await registry_edits.insert_device(target, "bob", device_id="d1", device_type="agv")
        await connection.execute("update device set status = 'suspended'")
        assert [(row["operation"], row["claimed_by"]) for row in await trail(connection, "device")] == [
            ("INSERT", "bob"),
            ("UPDATE", None),
        ]


async def test_a_role_that_was_assumed_does_not_hide_who_logged_in(scratch: asyncpg.Connection) -> None:
    await scratch.execute("create role assumed")
    await scratch.execute("grant insert on device_type to assumed")
    await scratch.execute("set local role assumed")
    await scratch.execute("insert into device_type (name) values ('agv')")
    await scratch.execute("reset role")
    assert (await trail(scratch, "device_type"))[-1]["role"] == "postgres"


async def test_insert_and_delete_show_the_row_that_came_and_the_row_that_went(scratch: asyncpg.Connection) -> None:
    await add_devices(scratch)
    await scratch.execute("delete from device")
    came, went = await trail(scratch, "device")
    assert (came["operation"], came["key"], came["before"]) == ("INSERT", "d1", None)
    assert (went["operation"], went["key"], went["after"]) == ("DELETE", "d1", None)
    assert came["after"] == went["before"]
    assert came["after"]["common_name"] == "d1"


async def test_a_bulk_statement_leaves_one_row_for_each_row_it_touched(scratch: asyncpg.Connection) -> None:
    await add_devices(scratch, 500)
    await scratch.execute("update device set status = 'suspended' where length(device_id) = 3")
    await scratch.execute("delete from device where length(device_id) = 2")
    rows = await trail(scratch, "device")
    assert [row["operation"] for row in rows].count("INSERT") == 500
    assert {row["key"] for row in rows if row["operation"] == "UPDATE"} == {f"d{n}" for n in range(10, 100)}
    assert {row["key"] for row in rows if row["operation"] == "DELETE"} == {f"d{n}" for n in range(1, 10)}
    assert all(row["before"]["device_id"] == row["after"]["device_id"] for row in rows if row["operation"] == "UPDATE")


async def test_copy_upsert_merge_and_cascades_are_told(scratch: asyncpg.Connection) -> None:
    await add_devices(scratch)
    await scratch.copy_records_to_table(
        "device", records=[("c1", "c1", "agv"), ("c2", "c2", "agv")], columns=("device_id", "common_name", "type")
    )
    assert [row["key"] for row in await trail(scratch, "device")] == ["d1", "c1", "c2"]
    await scratch.execute(
        "insert into device (device_id, type) values ('d1', 'agv'), ('u1', 'agv') "
        "on conflict (device_id) do update set status = 'suspended'"
    )
    assert sorted((row["operation"], row["key"]) for row in (await trail(scratch, "device"))[3:]) == [
        ("INSERT", "u1"),
        ("UPDATE", "d1"),
    ]
    await scratch.execute(
        "merge into device d using (values ('d1'), ('m1')) as w (id) on d.device_id = w.id "
        "when matched then delete when not matched then insert (device_id, type) values (w.id, 'agv')"
    )
    assert sorted((row["operation"], row["key"]) for row in (await trail(scratch, "device"))[5:]) == [
        ("DELETE", "d1"),
        ("INSERT", "m1"),
    ]
    await scratch.execute(
        "insert into topic_rule (device_id, effect, action, topic) values ('m1', 'allow', 'publish', 'x')"
    )
    await scratch.execute("delete from device where device_id = 'm1'")
    cascaded = (await trail(scratch, "topic_rule"))[-1]
    assert (cascaded["operation"], cascaded["before"]["topic"]) == ("DELETE", "x")
    await scratch.execute("update device_type set name = 'apm'")
    assert {row["after"]["type"] for row in await trail(scratch, "device") if row["operation"] == "UPDATE"} >= {"apm"}


async def test_a_statement_that_touches_nothing_leaves_nothing(scratch: asyncpg.Connection) -> None:
    await scratch.execute("update device set status = 'revoked'")
    await scratch.execute("delete from topic_rule")
    assert await scratch.fetchval("select count(*) from audit") == 0


async def test_truncate_is_told_as_such(scratch: asyncpg.Connection) -> None:
    await scratch.execute("set local authbackend.actor = 'carl'")
    await scratch.execute("truncate device_type cascade")
    rows = await scratch.fetch("select entity, key, claimed_by from audit where operation = 'TRUNCATE' order by entity")
    assert [tuple(row) for row in rows] == [
        ("certificate", None, "carl"),
        ("device", None, "carl"),
        ("device_schedule", None, "carl"),
        ("device_type", None, "carl"),
        ("topic_rule", None, "carl"),
    ]


async def test_a_changed_key_is_told_under_both_names(scratch: asyncpg.Connection) -> None:
    await add_devices(scratch, 2)
    await scratch.execute("update device set device_id = 'new', common_name = 'new' where device_id = 'd1'")
    rows = [row for row in await trail(scratch, "device") if row["operation"] == "UPDATE"]
    assert {row["key"] for row in rows} == {"d1", "new"}
    old = next(row for row in rows if row["key"] == "d1")
    new = next(row for row in rows if row["key"] == "new")
    assert (old["before"]["device_id"], old["after"]) == ("d1", None)
    assert (new["after"]["device_id"], new["before"]) == ("new", None)


async def test_what_is_rolled_back_is_not_told(scratch: asyncpg.Connection) -> None:
    await scratch.execute("savepoint a")
    await add_devices(scratch)
    await scratch.execute("rollback to a")
    assert await scratch.fetchval("select count(*) from audit") == 0


async def test_a_password_hash_is_told_as_set_or_changed_only(scratch: asyncpg.Connection) -> None:
    await scratch.execute("insert into account (name, login) values ('robot', 'password')")
    await scratch.execute("update account set password_hash = $1", HASH)
    await scratch.execute("update account set tags = '{monitoring}'")
    await scratch.execute("update account set password_hash = $1", OTHER_HASH)
    await scratch.execute("update account set password_hash = null")
    await scratch.execute("update account set password_hash = $1", HASH)
    await scratch.execute("update account set name = 'robot2'")
    await scratch.execute("delete from account")
    rows = await trail(scratch, "account")
    shown = [
        tuple(
            side and (side["password_hash"] if side["password_hash"] is not None else "none")
            for side in (row["before"], row["after"])
        )
        for row in rows
    ]
    assert shown[:6] == [
        (None, "none"),
        ("none", "changed"),
        ("set", "set"),
        ("set", "changed"),
        ("set", "none"),
        ("none", "changed"),
    ]
    assert shown[-1] == ("set", None)
    everything = await scratch.fetchval("select string_agg(a::text, '') from audit a")
    assert "argon2" not in everything
    assert "escudvJCsgt3ub" not in everything


@pytest.mark.parametrize(
    "statement",
    ["update audit set actor = 'x'", "delete from audit", "truncate audit", "delete from audit where false"],
)
@pytest.mark.parametrize("role", ["origin", "replica"])
async def test_the_trail_is_append_only_even_for_its_owner(
    scratch: asyncpg.Connection, statement: str, role: str
) -> None:
    await add_devices(scratch)
    await scratch.execute(f"set local session_replication_role = {role}")
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="the audit trail is append-only"):
        async with scratch.transaction():
            await scratch.execute(statement)
    assert await scratch.fetchval("select count(*) from audit") == 2


async def test_the_trail_is_written_in_a_session_that_applies_changes_like_a_replica(
    scratch: asyncpg.Connection,
) -> None:
    await scratch.execute("set local session_replication_role = replica")
    await add_devices(scratch)
    assert [row["key"] for row in await trail(scratch, "device")] == ["d1"]


async def test_the_trail_cannot_be_redirected_by_a_search_path(scratch: asyncpg.Connection) -> None:
    await scratch.execute("create temp table audit (like public.audit including all)")
    await scratch.execute("create temp table change (like public.change including all)")
    await scratch.execute("insert into device_type (name) values ('agv')")
    assert await scratch.fetchval("select count(*) from pg_temp.audit") == 0
    assert await scratch.fetchval("select count(*) from public.audit") == 1
    assert await scratch.fetchval("select count(*) from public.change") >= 1


async def test_the_version_in_the_trail_is_the_one_that_an_edit_returns(dsn: str, postgres: Server) -> None:
    async with connected(dsn) as connection:
        await connection.execute("insert into device_type (name) values ('agv')")
        version = await registry_edits.insert_device(Target(dsn), "bob", device_id="d1", device_type="agv")
        assert (
            await connection.fetchval("select version::text from audit where key = 'd1'") == version.partition("@")[0]
        )
