"""SQL is a public interface: statements of common tools work on every table people write, and names can be swapped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.postgres.test_roles import ADMIN, give_roles
from tests.support.postgres import Server, connected, until

FLEET = """
insert into device_type (name, client_ids, vhosts) values ('T', '{"{device_id}"}', '{/}'), ('U', '{"{device_id}"}', '{/}');
insert into device (device_id, common_name, type) values ('D1', 'A', 'T'), ('D2', 'B', 'T'), ('D3', 'C', 'T');
insert into account (name, login, vhosts) values ('ops', 'certificate', '{/}');
insert into topic_rule (device_type, effect, action, topic, note) values ('T', 'allow', 'publish', 'a/#', 'one');
insert into authority values ('fleet', 'CN=CA', '-----BEGIN CERTIFICATE-----', '2099-01-01Z');
insert into certificate (fingerprint, serial, issuer, subject, common_name, not_before, not_after)
  values (repeat('a', 64), '1', 'CN=CA', 'CN=A', 'A', '2026-01-01Z', '2099-01-01Z');
insert into crl values ('fleet', 5, '2026-01-01Z', '2099-01-01Z', 'x');
insert into device_schedule (device_id, at, status) values ('D1', '2099-01-01Z', 'revoked');
"""


@pytest.fixture
async def sql(dsn: str, postgres: Server, database: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection of the admin role."""
    async with connected(dsn) as owner:
        await owner.execute(FLEET)
    give_roles(postgres, database)
    async with connected(postgres.dsn(database, ADMIN)) as editor:
        yield editor


NAMES = "select device_id, common_name from device order by 1"


async def names(sql: asyncpg.Connection) -> dict[str, str]:
    return {row["device_id"]: row["common_name"] for row in await sql.fetch(NAMES)}


# --- every key can be the target of an upsert ------------------------------------------------------------------------

ROWS = {
    "device": ("(device_id, common_name, type) values ('D1', 'A', 'U')", ["(device_id)", "(common_name)"], "type = excluded.type"),
    "device_type": ("(name, description) values ('T', 'new')", ["(name)"], "description = excluded.description"),
    "account": ("(name, login) values ('ops', 'certificate')", ["(name)"], "login = excluded.login"),
    "topic_rule": (
        "(device_type, effect, action, topic, note) values ('T', 'allow', 'publish', 'a/#', 'two')",
        ["(device_type, device_id, account, effect, action, topic, exchange)"],
        "note = excluded.note",
    ),
    "authority": ("values ('fleet', 'CN=CA', '-----BEGIN CERTIFICATE-----', '2099-01-01Z')", ["(name)", "(subject)"], "not_after = excluded.not_after"),
    "certificate": (
        ("(fingerprint, serial, issuer, subject, common_name, not_before, not_after)"
        " values (repeat('a', 64), '1', 'CN=CA', 'CN=A', 'A', '2026-01-01Z', '2099-01-01Z')"),
        ["(fingerprint)", "(issuer, serial)"],
        "device_id = 'D1'",
    ),
    "crl": ("values ('fleet', 6, '2026-01-02Z', '2099-01-01Z', 'y')", ["(authority)"], "number = excluded.number, der = excluded.der"),
    "device_schedule": ("(device_id, at, status) values ('D1', '2099-01-01Z', 'suspended')", ["(device_id, at)"], "status = excluded.status"),
    "crl_listed": ("values ('CN=CA', '1', 5)", ["(issuer, serial)"], "number = excluded.number"),
}  # fmt: skip
UPSERTS = [(table, target) for table, (_, targets, _) in ROWS.items() for target in targets]


async def test_every_unique_key_of_a_table_that_people_write_is_tried(sql: asyncpg.Connection) -> None:
    keys = await sql.fetch(
        """
        select c.relname as table, '(' || string_agg(a.attname, ', ' order by k.n) || ')' as key
        from pg_index i join pg_class c on c.oid = i.indrelid cross join unnest(i.indkey) with ordinality as k (attnum, n)
        join pg_attribute a on a.attrelid = c.oid and a.attnum = k.attnum
        where i.indisunique and c.relnamespace = 'public'::regnamespace and has_table_privilege(c.oid, 'insert')
        group by c.relname, i.indexrelid
        """
    )
    numbered = ("topic_rule", "(id)")
    assert {(row["table"], row["key"]) for row in keys} - {numbered} == set(UPSERTS)


@pytest.mark.parametrize("table", ROWS)
async def test_on_conflict_do_nothing_without_a_target(sql: asyncpg.Connection, table: str) -> None:
    values, _, _ = ROWS[table]
    await sql.execute(f"insert into {table} {values} on conflict do nothing")
    again = f"insert into {table} {values} on conflict do nothing returning 1"
    assert await sql.fetch(again) == []


@pytest.mark.parametrize(("table", "target"), UPSERTS)
async def test_an_upsert_by_any_key(sql: asyncpg.Connection, table: str, target: str) -> None:
    values, _, change = ROWS[table]
    await sql.execute(f"insert into {table} {values} on conflict do nothing")
    await sql.execute(f"insert into {table} {values} on conflict {target} do nothing")
    row = await sql.fetch(
        f"insert into {table} {values} on conflict {target} do update set {change} returning to_jsonb({table}) as written"
    )
    assert len(row) == 1
    assert await sql.fetchval(f"select count(*) from {table} as t where to_jsonb(t) = $1", row[0]["written"]) == 1


async def test_a_merge_on_every_table(sql: asyncpg.Connection) -> None:
    await sql.execute("""
        merge into device d using (values ('D1', 'A', 'U'), ('N1', 'N', 'U')) as w (id, name, type) on d.device_id = w.id
        when matched then update set type = w.type when not matched then insert (device_id, common_name, type) values (w.id, w.name, w.type)""")
    await sql.execute("""
        merge into device_type t using (values ('T', 'x'), ('V', 'y')) as w (name, description) on t.name = w.name
        when matched then update set description = w.description when not matched then insert (name, description) values (w.name, w.description)""")
    await sql.execute("""
        merge into topic_rule r using (values ('T', 'a/#', 'x'), ('U', 'b', 'y')) as w (type, topic, note) on r.device_type = w.type and r.topic = w.topic
        when matched then update set note = w.note
        when not matched then insert (device_type, effect, action, topic, note) values (w.type, 'allow', 'publish', w.topic, w.note)""")
    await sql.execute("""
        merge into account a using (values ('ops'), ('new')) as w (name) on a.name = w.name
        when matched then delete when not matched then insert (name, login) values (w.name, 'certificate')""")
    await sql.execute("""
        merge into certificate c using (values (repeat('a', 64))) as w (f) on c.fingerprint = w.f
        when matched then update set state = 'revoked', reason = 'keyCompromise'""")
    assert (
        await sql.fetchval("select string_agg(device_id || type, ' ' order by device_id) from device")
        == "D1U D2T D3T N1U"
    )
    assert await sql.fetchval("select string_agg(note, ' ' order by note) from topic_rule") == "x y"
    assert await sql.fetchval("select string_agg(name, ' ') from account") == "new"
    assert await sql.fetchval("select state from certificate") == "revoked"


async def test_copy_and_returning(sql: asyncpg.Connection) -> None:
    await sql.copy_records_to_table("device", records=[("C1", "T"), ("C2", "U")], columns=["device_id", "type"])
    assert (await names(sql))["C2"] == "C2"
    with pytest.raises(asyncpg.UniqueViolationError, match="common_name_is_taken"):
        await sql.copy_records_to_table(
            "device", records=[("C3", "A", "T")], columns=["device_id", "common_name", "type"]
        )
    row = await sql.fetchrow(
        "insert into device (device_id, type) values ('R1', 'T') returning device_id, common_name, status"
    )
    assert row is not None
    assert tuple(row) == ("R1", "R1", "active")
    assert await sql.fetchval("update device set common_name = 'Z' where device_id = 'R1' returning common_name") == "Z"
    assert await sql.fetchval("delete from device where device_id = 'R1' returning common_name") == "Z"


# --- what tools write ------------------------------------------------------------------------------------------------

TOOLS = {
    "SQLAlchemy, insert().on_conflict_do_update()": [
        ("INSERT INTO device (device_id, common_name, type, attributes) VALUES ('D1', 'A', 'U', '{\"site\": \"x\"}'), ('N1', 'N', 'U', '{}')"
        " ON CONFLICT (common_name) DO UPDATE SET type = excluded.type, attributes = excluded.attributes RETURNING device.device_id")
    ],
    "SQLAlchemy, insert many values": [
        ("INSERT INTO topic_rule (device_type, effect, action, topic, note) SELECT p0::VARCHAR, p1::VARCHAR, p2::VARCHAR, p3::VARCHAR, p4::VARCHAR"
        " FROM (VALUES ('T', 'allow', 'publish', 'x', '', 0), ('T', 'allow', 'publish', 'y', '', 1)) AS imp_sen(p0, p1, p2, p3, p4, sen_counter)"
        " ORDER BY sen_counter RETURNING topic_rule.id, topic_rule.id AS id__1")
    ],
    "SQLAlchemy, a unit of work": [
        "UPDATE device SET status='suspended', status_reason='x' WHERE device.device_id = 'D1'",
        ("INSERT INTO device (device_id, common_name, type, status, status_reason, attributes, expires_at)"
        " VALUES ('N1', 'N', 'T', 'active', '', '{}', NULL) RETURNING device.status_changed_at"),
        "DELETE FROM device WHERE device.device_id = 'D2'",
    ],
    "Django, bulk_create(update_conflicts=True)": [
        ('INSERT INTO "device" ("device_id", "common_name", "type", "status") VALUES (\'D1\', \'A\', \'U\', \'active\'), (\'N1\', \'N\', \'T\', \'active\')'
        ' ON CONFLICT("device_id") DO UPDATE SET "type" = EXCLUDED."type", "status" = EXCLUDED."status"')
    ],
    "Django, bulk_create(ignore_conflicts=True)": [
        'INSERT INTO "device" ("device_id", "common_name", "type") VALUES (\'D1\', \'A\', \'U\'), (\'N1\', \'N\', \'T\') ON CONFLICT DO NOTHING'
    ],
    "Django, bulk_update() of names that change hands": [
        ('UPDATE "device" SET "common_name" = (CASE WHEN ("device"."device_id" = \'D1\') THEN \'B\' WHEN ("device"."device_id" = \'D2\') THEN \'A\' ELSE NULL END)::text'
        ' WHERE "device"."device_id" IN (\'D1\', \'D2\')')
    ],
    "Ansible, community.postgresql.postgresql_query": [
        "INSERT INTO device (device_id, type) VALUES ('N1', 'T') ON CONFLICT DO NOTHING",
        "UPDATE device SET attributes = attributes || '{\"site\": \"hamburg\"}' WHERE device_id = 'N1' AND attributes ->> 'site' IS DISTINCT FROM 'hamburg'",
    ],
    "Ansible, community.postgresql.postgresql_copy": [
        "DROP TABLE IF EXISTS arrived",
        "CREATE TEMP TABLE arrived (LIKE device INCLUDING DEFAULTS)",
        "INSERT INTO arrived (device_id, common_name, type) VALUES ('D1', 'A', 'U'), ('N1', 'N', 'T')",
        "INSERT INTO device SELECT * FROM arrived ON CONFLICT (device_id) DO UPDATE SET type = EXCLUDED.type",
    ],
    "Terraform, a provider that runs statements": [
        "DO $$ BEGIN INSERT INTO account (name, login) VALUES ('ci', 'certificate') ON CONFLICT (name) DO UPDATE SET login = EXCLUDED.login; END $$",
        "DELETE FROM account WHERE name = 'ci'",
    ],
    "a type and its devices in one statement": [
        ("WITH t AS (INSERT INTO device_type (name) VALUES ('W') RETURNING name), d AS (INSERT INTO device (device_id, type) SELECT 'N1', name FROM t RETURNING device_id)"
        " INSERT INTO topic_rule (device_id, effect, action, topic) SELECT device_id, 'allow', 'publish', 'x' FROM d")
    ],
    "a type by a statement of its own inside of another one": [
        "WITH t AS (INSERT INTO device_type (name) VALUES ('W')) INSERT INTO device (device_id, type) VALUES ('N1', 'W')"
    ],
    "one snapshot": ["BEGIN ISOLATION LEVEL REPEATABLE READ", "INSERT INTO device (device_id, type) VALUES ('N1', 'T')", "COMMIT"],
}  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
async def test_what_a_tool_writes_is_taken_again_and_again(sql: asyncpg.Connection, tool: str) -> None:
    for statement in TOOLS[tool]:
        await sql.execute(statement)
    if "bulk_update" in tool:
        assert await names(sql) == {"D1": "B", "D2": "A", "D3": "C"}
    elif "Terraform" not in tool and "many values" not in tool:
        assert "N1" in await names(sql)
    if "unit of work" in tool or " statement" in tool or "one snapshot" in tool or "many values" in tool:
        return
    for statement in TOOLS[tool]:
        await sql.execute(statement)


# --- names change hands ----------------------------------------------------------------------------------------------

FORMS = {
    "update": "update device d set common_name = w.name from ({values}) as w (id, name) where d.device_id = w.id",
    "upsert": "insert into device (device_id, common_name, type) select id, name, 'T' from ({values}) as w (id, name) where true "
    "on conflict (device_id) do update set common_name = excluded.common_name",
    "merge": "merge into device d using ({values}) as w (id, name) on d.device_id = w.id when matched then update set common_name = w.name",
}  # fmt: skip


def handed(names: dict[str, str]) -> str:
    return "values " + ", ".join(f"('{device_id}', '{name}')" for device_id, name in names.items())


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as opened:
        yield opened


@pytest.mark.parametrize("form", FORMS)
def test_any_names_change_hands_if_they_differ_in_the_end(dsn: str, runner: asyncio.Runner, form: str) -> None:
    """As with a constraint that is checked at the end of the statement."""
    ids = [f"D{n}" for n in range(1, 7)]

    async def attempt(connection: asyncpg.Connection, given: dict[str, str]) -> None:
        transaction = connection.transaction()
        await transaction.start()
        try:
            was = await names(connection)
            wanted = was | given
            last = await connection.fetchval("select max(id) from audit")
            statement = FORMS[form].format(values=handed(given))
            if len(set(wanted.values())) < len(wanted):
                with pytest.raises(asyncpg.UniqueViolationError) as caught:
                    await connection.execute(statement)
                assert caught.value.constraint_name == "common_name_is_taken"
                assert "," not in caught.value.args[0].replace(", and no two", "")
                return
            await connection.execute(statement)
            assert await names(connection) == wanted
            rows = await connection.fetch("select key, before, after from audit where id > $1", last)
            told = {
                r["key"]: (json.loads(r["before"])["common_name"], json.loads(r["after"])["common_name"]) for r in rows
            }
            assert len(rows) == len(told)
            assert told == {device_id: (was[device_id], name) for device_id, name in given.items()}
            tasks = await connection.fetch(
                "select details ->> 'common_name' as name from enforcement where causes @> '{renamed}'"
            )
            assert sorted(r["name"] for r in tasks) == sorted(was[i] for i, name in given.items() if name != was[i])
        finally:
            await transaction.rollback()

    async def opened() -> asyncpg.Connection:
        connection = await asyncpg.connect(dsn)
        await connection.execute("insert into device_type (name) values ('T')")
        await connection.execute("insert into enforcement_setup (hold_limit_s) values (30)")
        await connection.execute("insert into enforcement_cluster (name) values ('k')")
        for device_id in ids:
            await connection.execute(
                "insert into device (device_id, common_name, type) values ($1, 'N' || $1, 'T')", device_id
            )
        return connection

    connection = runner.run(opened())
    pool = [*(f"N{device_id}" for device_id in ids), "free"]

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.one_of(
            st.permutations(ids).flatmap(lambda some: st.tuples(st.just(some), st.permutations(pool[:-1]))),
            st.lists(st.sampled_from(ids), unique=True, min_size=1).flatmap(
                lambda some: st.tuples(
                    st.just(some), st.lists(st.sampled_from(pool), min_size=len(some), max_size=len(some))
                )
            ),
        )
    )
    def same(pair: tuple[list[str], list[str]]) -> None:
        runner.run(attempt(connection, dict(zip(*pair, strict=True))))

    same()
    runner.run(connection.close())


async def test_a_name_that_is_taken_is_told_with_who_has_it_and_what_to_write(sql: asyncpg.Connection) -> None:
    with pytest.raises(asyncpg.UniqueViolationError) as caught:
        await sql.execute("update device set common_name = 'B' where device_id = 'D1'")
    assert caught.value.args[0] == "common name 'B' of device 'D1': device 'D2' has it, and no two devices can"
    assert "Names change hands in one statement: UPDATE device SET common_name = CASE" in str(caught.value.hint)
    assert await names(sql) == {"D1": "A", "D2": "B", "D3": "C"}


@pytest.mark.parametrize("statement", [
    "insert into device (device_id, common_name, type) values ('N1', ',A', 'T')",
    "insert into device (device_id, common_name, type) values ('N1', ',free', 'T') on conflict do nothing",
    "update device set common_name = ',A' where device_id = 'D2'",
    "update device set common_name = ',free'",
])  # fmt: skip
async def test_nobody_writes_the_mark_of_a_name_that_waits(sql: asyncpg.Connection, statement: str) -> None:
    with pytest.raises(asyncpg.CheckViolationError, match='"," is not possible'):
        await sql.execute(statement)


async def test_a_name_of_a_device_that_is_deleted_meanwhile_is_waited_for(sql: asyncpg.Connection, dsn: str) -> None:
    async with connected(dsn) as other:
        transaction = other.transaction()
        await transaction.start()
        await other.execute("delete from device where device_id = 'D2'")
        waiting = asyncio.create_task(sql.execute("update device set common_name = 'B' where device_id = 'D1'"))
        waits = "select exists (select from pg_locks where not granted and pid = $1)"
        await until(lambda: other.fetchval(waits, sql.get_server_pid()), "the update waits for the deletion")
        await transaction.commit()
        assert await waiting == "UPDATE 1"
    assert await names(sql) == {"D1": "B", "D3": "C"}


async def test_returning_marks_a_name_that_is_not_free_yet(sql: asyncpg.Connection) -> None:
    swap = "update device set common_name = case device_id when 'D1' then 'B' else 'A' end where device_id in ('D1', 'D2') returning common_name"
    assert sorted(row[0] for row in await sql.fetch(swap)) == [",B", "A"]
    assert await names(sql) == {"D1": "B", "D2": "A", "D3": "C"}
