"""The trail names the role that logged in, and no role of people can change a table without an audit row."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import asyncpg
import pytest
from click.testing import CliRunner
from structlog.testing import capture_logs

from authbackend.cli import main
from authbackend.postgres import enforcement, registry_edits, replicas
from authbackend.postgres.connection import Target
from authbackend.postgres.enforcement import PostgresTaskStore
from authbackend.postgres.locks import ENFORCE
from authbackend.postgres.statements import load_statements
from tests.postgres.test_roles import ADMIN, FLEET, READER, SERVICE, give_roles
from tests.support.postgres import Server, connected, until

WORK = """
insert into enforcement_setup (hold_limit_s) values (30);
insert into enforcement_cluster (name) values ('c');
update device set status = 'revoked' where device_id = 'd2';
insert into device_hold (device_id, until) values ('d1', 'infinity');
insert into client_id_move (device_type, former, until) values ('agv', '{x}', 'infinity');
insert into replica (id, name, program_version, workers, longest_staleness_s) values (gen_random_uuid(), 'north', '1', 1, 60);
"""
NOT_FOR_PEOPLE = (
    "enforcement",
    "enforcement_setup",
    "enforcement_cluster",
    "enforcement_pause",
    "enforcement_sweep",
    "enforcement_expiry",
    "device_hold",
    "client_id_move",
    "replica",
    "audit",
    "change",
    "acting_for",
    "crl_installed",
    "crl_reporter",
)


@pytest.fixture
async def fleet(postgres: Server, database: str, connection: asyncpg.Connection) -> AsyncIterator[asyncpg.Connection]:
    """A fleet with a task, a hold and a replica; ``ann`` is on the security team, ``api`` may speak for others."""
    give_roles(postgres, database)
    await connection.execute(FLEET)
    await connection.execute(WORK)
    await connection.execute(
        "create role ann login in role authbackend_admin;"
        "create role api login in role authbackend_admin, authbackend_speaks_for_others"
    )
    yield connection
    await connection.execute("drop role ann; drop role api")


async def trail(connection: asyncpg.Connection, entity: str) -> list[dict[str, Any]]:
    rows = await connection.fetch("select * from audit where entity = $1 order by id", entity)
    return [
        {
            **row,
            "before": row["before"] and json.loads(row["before"]),
            "after": row["after"] and json.loads(row["after"]),
        }
        for row in rows
    ]


def people(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    return [(row["role"], row["actor"], row["claimed_by"]) for row in rows]


# --- who ---------------------------------------------------------------------------------------------------------------


async def test_the_trails_person_is_who_logged_in_whatever_the_client_says(
    fleet: asyncpg.Connection, postgres: Server, database: str
) -> None:
    async with connected(postgres.dsn(database, "ann")) as ann:
        await ann.execute("set authbackend.actor = 'bob'; set role authbackend_admin")
        await ann.execute("update device set attributes = '{\"site\": \"x\"}' where device_id = 'd1'")
    assert people(await trail(fleet, "device"))[-1] == ("ann", "ann", "bob")
    await registry_edits.set_device_status(Target(postgres.dsn(database, "ann")), "root@laptop", "d1", "revoked", "")
    assert people(await trail(fleet, "device"))[-1] == ("ann", "ann", "root@laptop")
    (task,) = await enforcement.list_tasks(Target(postgres.dsn(database, READER)), name="d1")
    assert (task["by"], task["claimed_by"]) == ("ann", "root@laptop")


async def test_who_may_speak_for_others_names_the_person_and_nobody_else_does(
    fleet: asyncpg.Connection, postgres: Server, database: str
) -> None:
    await registry_edits.set_device_status(Target(postgres.dsn(database, "api")), "ann", "d1", "suspended", "")
    assert people(await trail(fleet, "device"))[-1] == ("api", "ann", "ann")
    async with connected(postgres.dsn(database, "api")) as api:
        await api.execute("update device set status_reason = 'x' where device_id = 'd1'")
    assert people(await trail(fleet, "device"))[-1] == ("api", "api", None)
    # Nor does the owner, although PostgreSQL treats a superuser as a member of every role.
    await registry_edits.set_device_status(Target(postgres.dsn(database)), "ann", "d1", "revoked", "")
    assert people(await trail(fleet, "device"))[-1] == ("postgres", "postgres", "ann")


@pytest.mark.parametrize(
    "statement",
    [
        "grant authbackend_speaks_for_others to ann",
        "set role authbackend_speaks_for_others",
        "set role authbackend_service",
        "set role api",
        "set session authorization api",
        "alter role ann superuser",
        "alter role api password 'x'",
    ],
)
async def test_nobody_takes_another_name(
    fleet: asyncpg.Connection, postgres: Server, database: str, statement: str
) -> None:
    async with connected(postgres.dsn(database, "ann")) as ann:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await ann.execute(statement)


async def test_what_is_scheduled_is_made_in_the_name_of_who_scheduled_it_and_of_nobody_they_name(
    fleet: asyncpg.Connection, postgres: Server, database: str
) -> None:
    async with connected(postgres.dsn(database, "ann")) as ann:
        await ann.execute("set authbackend.actor = 'bob'")
        await ann.execute(
            "insert into device_schedule (device_id, at, status, actor, claimed_by)"
            " values ('d1', now() - interval '1 s', 'revoked', 'carl', 'carl')"
        )
        for forbidden in ("device_id = 'd2'", "actor = 'carl'", "claimed_by = 'carl'"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await ann.execute(f"update device_schedule set {forbidden}")
    async with connected(postgres.dsn(database, SERVICE)) as service:
        assert tuple(await service.fetchrow("select * from device_schedule_apply()")) == (1, None)
    assert people(await trail(fleet, "device"))[-1] == (SERVICE, "ann", "bob")
    (task,) = await fleet.fetch("select role, actor, claimed_by from enforcement where name = 'd1'")
    assert tuple(task) == (SERVICE, "ann", "bob")
    assert await fleet.fetchval("select count(*) from acting_for") == 0


async def test_a_schedule_that_somebody_else_changes_is_that_persons_and_a_renamed_device_keeps_its_own(
    fleet: asyncpg.Connection, postgres: Server, database: str
) -> None:
    await registry_edits.schedule_device_status(
        *(Target(postgres.dsn(database, "ann")), "ann@ops1", "d1", "revoked", ""),
        at=await fleet.fetchval("select now() + interval '1 h'"),
    )
    await fleet.execute("update device set device_id = 'd9' where device_id = 'd1'")
    (shown,) = (await registry_edits.get_device(Target(postgres.dsn(database, ADMIN)), "d9"))["scheduled"]
    assert (shown["actor"], shown["claimed_by"]) == ("ann", "ann@ops1")
    again = Target(postgres.dsn(database, "api"))
    await registry_edits.schedule_device_status(
        again, "ben", "d9", "suspended", "", at=datetime.fromisoformat(shown["at"])
    )
    assert tuple(await fleet.fetchrow("select actor, claimed_by from device_schedule")) == ("ben", "ben")
    async with connected(postgres.dsn(database, "api")) as api:
        await api.execute("update device_schedule set status = 'suspended'")
    assert tuple(await fleet.fetchrow("select actor, claimed_by from device_schedule")) == ("api", None)


# --- writes only by functions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [ADMIN, "ann", READER])
@pytest.mark.parametrize("table", NOT_FOR_PEOPLE)
async def test_people_do_not_write_the_tables_of_enforcement(
    fleet: asyncpg.Connection, postgres: Server, database: str, role: str, table: str
) -> None:
    column = await fleet.fetchval(
        "select attname from pg_attribute where attrelid = $1::regclass and attnum > 0 order by attnum desc limit 1",
        table,
    )
    statements = [
        f"insert into {table} default values",
        f"update {table} set {column} = default",
        f"delete from {table}",
        f"truncate {table} cascade",
        f"select from {table} for update",
        f"select from {table} for key share",
        f"lock table {table} in row share mode",
        f"lock table {table} in share mode",
        f"create trigger t after insert on {table} execute function pg_catalog.suppress_redundant_updates_trigger()",
        f"create rule r as on delete to {table} do instead nothing",
        f"alter table {table} disable trigger all",
        f"merge into {table} using (select) as x on true when matched then delete",
    ]
    if table in ("audit", "enforcement"):
        statements.append(f"select setval('{table}_id_seq', 1)")
    async with connected(postgres.dsn(database, role)) as session:
        for statement in statements:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                async with session.transaction():
                    await session.execute(statement)
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await session.copy_records_to_table(table, records=[], columns=(column,))


@pytest.mark.parametrize("role", [ADMIN, READER, SERVICE])
async def test_no_view_writes(fleet: asyncpg.Connection, postgres: Server, database: str, role: str) -> None:
    views = [
        row["relname"]
        for row in await fleet.fetch(
            "select relname from pg_class where relkind in ('v', 'm') and relnamespace = 'public'::regnamespace"
        )
    ]
    assert views == ["replica_state"]
    async with connected(postgres.dsn(database, role)) as session:
        for statement in ("delete from replica_state", "update replica_state set name = 'x'"):
            with pytest.raises(asyncpg.PostgresError, match="permission denied|cannot (delete from|update) view"):
                await session.execute(statement)


@pytest.mark.parametrize("role", [ADMIN, READER, "ann", "api", "outsider"])
async def test_what_people_can_write_is_watched_by_the_trail(fleet: asyncpg.Connection, role: str) -> None:
    """A new table must either be watched by enabled-always triggers, or not be writable by people."""
    rows = await fleet.fetch(
        """
        select c.relname, (select array_agg(t.tgname::text order by t.tgname) from pg_trigger t join pg_proc p on p.oid = t.tgfoid
                           where t.tgrelid = c.oid and p.proname = 'audit_note' and t.tgenabled = 'A') as watched
        from pg_class c where c.relkind in ('r', 'p', 'v', 'm', 'f') and c.relnamespace = 'public'::regnamespace
          and (has_any_column_privilege($1, c.oid, 'insert, update') or has_table_privilege($1, c.oid, 'delete, truncate, trigger'))
        """,
        role,
    )
    assert {row["relname"] for row in rows if row["watched"] != ["audit_d", "audit_i", "audit_t", "audit_u"]} == set()
    assert bool(rows) == (role in (ADMIN, "ann", "api"))


PEOPLES_FUNCTIONS = {
    "accept_impact",
    "acting_person",
    "crl_forget",
    "enforcement_cluster_forget",
    "enforcement_disable",
    "enforcement_overdue",
    "enforcement_pause_begin",
    "enforcement_pause_end",
    "enforcement_retry",
    "impact",
    "incarnation_renew",
    "replica_forget",
}


async def test_what_runs_with_the_owners_rights_is_known_function_by_function(fleet: asyncpg.Connection) -> None:
    """A new SECURITY DEFINER function must be reviewed: does it write, and does it write an audit row?"""
    allowed = (
        "select proname from pg_proc where pronamespace = 'public'::regnamespace and prosecdef"
        " and has_function_privilege($1, oid, 'execute')"
    )
    assert {row["proname"] for row in await fleet.fetch(allowed, ADMIN)} == PEOPLES_FUNCTIONS
    assert {row["proname"] for row in await fleet.fetch(allowed, READER)} == {"acting_person", "enforcement_overdue"}
    assert {row["proname"] for row in await fleet.fetch(allowed, "outsider")} == {"acting_person"}


async def test_a_task_that_a_person_may_only_read_is_not_kept_from_being_closed(
    fleet: asyncpg.Connection, postgres: Server, database: str
) -> None:
    """A role that could lock its row could make enforcement do it again and again."""
    async with connected(postgres.dsn(database, "ann")) as ann, connected(postgres.dsn(database, SERVICE)) as service:
        async with ann.transaction():
            await ann.execute("select * from enforcement")
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                async with ann.transaction():
                    await ann.execute("select * from enforcement for update")
            store = PostgresTaskStore(service)
            (task,) = await store.due("c", "urgent", set(), 10)
            await store.finish({task.id: {}})
            assert await fleet.fetchval("select state from enforcement where id = $1", task.id) == "done"


# --- what people may do leaves its rows ----------------------------------------------------------------------------------


async def test_doing_a_task_again_is_told_with_the_receipt_it_had(
    fleet: asyncpg.Connection, postgres: Server, database: str
) -> None:
    ann = Target(postgres.dsn(database, "ann"))
    number = await fleet.fetchval("select id from enforcement")
    await fleet.execute("update enforcement set state = 'done', finished_at = now(), receipt = '{\"looks\": 2}'")
    assert await enforcement.retry(ann, "ann@ops1", number) == 1
    (row,) = await trail(fleet, "enforcement")
    assert people([row]) == [("ann", "ann", "ann@ops1")]
    assert (row["operation"], row["key"]) == ("UPDATE", str(number))
    assert (row["before"]["state"], row["after"]["state"]) == ("done", "waiting")
    assert row["before"]["receipt"] == {"looks": 2}
    assert await enforcement.retry(ann, "ann@ops1", None) == 1
    assert len(await trail(fleet, "enforcement")) == 2


async def test_forgetting_a_cluster_is_told_with_each_task_that_is_not_done(
    fleet: asyncpg.Connection, postgres: Server, database: str
) -> None:
    assert await enforcement.forget_cluster(Target(postgres.dsn(database, "ann")), "ann@ops1", "c") == 1
    cluster, task = (await trail(fleet, "enforcement_cluster"))[-1], (await trail(fleet, "enforcement"))[-1]
    assert people([cluster, task]) == [("ann", "ann", "ann@ops1")] * 2
    assert (cluster["operation"], cluster["key"]) == ("DELETE", "c")
    assert (task["before"]["state"], task["after"]["state"]) == ("waiting", "superseded")
    assert "not looked at again" in task["after"]["receipt"]["superseded"]


async def test_switching_enforcement_off_and_lifting_holds_is_told(
    fleet: asyncpg.Connection, postgres: Server, database: str
) -> None:
    assert await enforcement.disable(Target(postgres.dsn(database, "ann")), "ann@ops1") == (1, 1)
    for entity, key in (
        ("enforcement_setup", "true"),
        ("enforcement_cluster", "c"),
        ("device_hold", "d1"),
        ("client_id_move", "agv"),
    ):
        row = (await trail(fleet, entity))[-1]
        assert (row["operation"], row["key"], row["after"]) == ("DELETE", key, None)
        assert row["before"]
        assert people([row]) == [("ann", "ann", "ann@ops1")]
        assert await fleet.fetchval(f"select count(*) from {entity}") == 0


async def test_a_service_that_leads_again_with_the_same_limit_leaves_no_row(fleet: asyncpg.Connection) -> None:
    enable = load_statements("enforcement").enable.sql
    before = len(await trail(fleet, "enforcement_setup"))
    await fleet.execute(enable, 30.0, ["c"])
    assert len(await trail(fleet, "enforcement_setup")) == before
    await fleet.execute(enable, 40.0, ["c"])
    row = (await trail(fleet, "enforcement_setup"))[-1]
    assert (row["before"]["hold_limit_s"], row["after"]["hold_limit_s"]) == (30, 40)


async def test_a_pause_is_told_and_names_who_can_be_held_to_it(
    fleet: asyncpg.Connection, postgres: Server, database: str
) -> None:
    ann = Target(postgres.dsn(database, "ann"))
    for scope in ("bulk", "all"):
        found = await enforcement.pause(ann, "bob", scope)
        assert (found.scope, found.by, found.claimed_by) == (scope, "ann", "bob")
    assert await enforcement.resume(ann, "bob")
    assert not await enforcement.resume(ann, "bob")
    rows = await trail(fleet, "enforcement_pause")
    assert [row["operation"] for row in rows] == ["INSERT", "DELETE", "INSERT", "DELETE"] or [
        row["operation"] for row in rows
    ] == ["INSERT", "UPDATE", "UPDATE", "DELETE"]
    assert set(people(rows)) == {("ann", "ann", "bob")}


async def test_forgetting_a_replica_is_told_with_what_it_was(
    fleet: asyncpg.Connection, postgres: Server, database: str
) -> None:
    assert await replicas.forget_replica(Target(postgres.dsn(database, "ann")), "ann@ops1", "north") == 1
    (row,) = await trail(fleet, "replica")
    assert people([row]) == [("ann", "ann", "ann@ops1")]
    assert (row["operation"], row["before"]["name"]) == ("DELETE", "north")


# --- documented commands still work --------------------------------------------------------------------------------------


async def test_a_person_of_the_security_team_does_the_documented_work_by_psql(
    fleet: asyncpg.Connection, postgres: Server, database: str
) -> None:
    last = await fleet.fetchval("select max(id) from audit")
    async with connected(postgres.dsn(database, "ann")) as ann:
        for statement in (
            "insert into device_type (name, client_ids, vhosts) values ('cam', array['{device_id}'], array['/'])",
            "insert into device (device_id, type) values ('c1', 'cam')",
            "insert into topic_rule (device_type, effect, action, topic) values ('cam', 'allow', 'publish', 'x/{device_id}')",
            "update device set status = 'suspended', status_reason = 'lost' where device_id = 'c1'",
            "update device_type set description = 'cameras' where name = 'cam'",
            "update account set tags = '{monitoring}' where name = 'robot'",
            "update certificate set state = 'revoked' where serial = '1'",
            "insert into device_schedule (device_id, at, status) values ('c1', now() + interval '1 h', 'active')",
            "update device_schedule set at = at + interval '1 h', reason = 'later' where device_id = 'c1'",
            "delete from device_schedule where device_id = 'c1'",
            "delete from topic_rule where device_type = 'cam'",
            "delete from device where device_id = 'c1'",
            "delete from device_type where name = 'cam'",
            "select enforcement_retry(null)",
            "select enforcement_pause_begin('bulk')",
            "select enforcement_pause_end()",
            "select registry_version()",
        ):
            await ann.execute(statement)
        await ann.copy_records_to_table(
            "device", records=[("c2", "c2", "agv")], columns=("device_id", "common_name", "type")
        )
    rows = await fleet.fetch("select * from audit where id > $1", last)
    assert {(row["role"], row["actor"], row["claimed_by"]) for row in rows} == {("ann", "ann", None)}
    assert {row["entity"] for row in rows} == {
        *("device_type", "device", "topic_rule", "account", "certificate", "device_schedule"),
        *("enforcement", "enforcement_pause"),
    }


# --- a lock that any role may take ---------------------------------------------------------------------------------------


async def test_who_keeps_every_replica_from_enforcing_by_its_lock_is_named_in_the_log(
    fleet: asyncpg.Connection, postgres: Server, database: str
) -> None:
    taken: list[bool] = []

    async def lead() -> None:
        async with enforcement.leading(Target(postgres.dsn(database, SERVICE)), 30, ["c"], taken.append):
            pass

    def command(*arguments: str) -> str:
        done = CliRunner().invoke(main, [*arguments], env={"AUTHBACKEND_DATABASE__DSN": postgres.dsn(database, READER)})
        assert done.exit_code == 0, done.output
        return done.output

    with capture_logs() as logged:

        async def named() -> bool:
            return any(entry["event"] == "enforcement.lock_taken" for entry in logged)

        async with connected(postgres.dsn(database, "ann"), server_settings={"application_name": "psql"}) as ann:
            await ann.execute("select pg_advisory_lock($1)", ENFORCE)
            leading = asyncio.create_task(lead())
            await until(named, "the log names who has the lock")
            (entry,) = logged
            assert (entry["role"], entry["application"], entry["log_level"]) == ("ann", "psql", "error")
            assert entry["pid"] == ann.get_server_pid()
            assert taken[-1], "the metric says it"
            told = f"nobody enforces: process {entry['pid']} (role ann, psql) holds the lock of enforcement"
            assert told in await asyncio.to_thread(command, "enforcement", "list")
            (task,) = await enforcement.list_tasks(Target(postgres.dsn(database, READER)))
            assert told in await asyncio.to_thread(command, "enforcement", "show", str(task["id"]))
        async with asyncio.timeout(10):
            await leading
        assert not taken[-1]
        assert "nobody enforces" not in await asyncio.to_thread(command, "enforcement", "list")


async def test_another_replica_that_enforces_is_no_stranger(
    fleet: asyncpg.Connection, postgres: Server, database: str
) -> None:
    async with connected(postgres.dsn(database, SERVICE)) as service:
        await service.execute("select pg_advisory_lock($1)", ENFORCE)
        holders = load_statements("enforcement").strangers_with_the_lock.sql
        assert await fleet.fetch(holders, ENFORCE) == []
    async with connected(postgres.dsn(database, "outsider")) as outsider:
        await outsider.execute("select pg_advisory_lock($1)", ENFORCE)
        (holder,) = await fleet.fetch(holders, ENFORCE)
        assert holder["role"] == "outsider"
