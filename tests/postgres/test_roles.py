"""Each role of sql/roles.sql can do its work, and nothing that would hide or forge a change."""

from __future__ import annotations

import json
import shlex
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from click.testing import CliRunner, Result

from authbackend.cli import main
from authbackend.postgres.change_feed import ChangeFeed
from authbackend.postgres.connection import Target
from authbackend.postgres.crls import StoredCrl, save_crl
from authbackend.postgres.statements import SQL
from tests.postgres.test_constraints import HASH
from tests.support.postgres import Server, connected, run
from tests.support.registry import new_store

SERVICE, ADMIN, READER = "authbackend_service", "authbackend_admin", "authbackend_reader"
OUTSIDER = "outsider"
ROLES = (SERVICE, ADMIN, READER, OUTSIDER)
TABLES = ("device_type", "device", "account", "topic_rule")
OTHERS_ON_RECORD = ("certificate", "authority", "crl", "device_schedule")

FLEET = f"""
insert into device_type (name, client_ids, vhosts) values ('agv', array['{{device_id}}'], array['/']);
insert into device (device_id, type) values ('d1', 'agv'), ('d2', 'agv');
insert into account (name, login, password_hash) values ('robot', 'password', '{HASH}');
insert into topic_rule (device_type, effect, action, topic) values ('agv', 'allow', 'publish', 'fleet/{{device_id}}/#');
insert into certificate (fingerprint, serial, issuer, subject, common_name, not_before, not_after)
  values (repeat('a', 64), '1', 'CN=CA', 'CN=d1', 'd1', '2026-01-01Z', '2099-01-01Z');
insert into authority values ('fleet', 'CN=CA', '-----BEGIN CERTIFICATE-----', '2099-01-01Z');
insert into crl values ('fleet', 5, '2026-01-01Z', '2099-01-01Z', '');
"""


def give_roles(postgres: Server, database: str) -> None:
    """Run roles.sql and let its roles log in; ``outsider`` is a role without privileges."""
    postgres.psql(database, (SQL / "roles.sql").read_text(encoding="utf-8"))
    postgres.psql(
        database,
        "do $$ begin if not exists (select from pg_roles where rolname = 'outsider') then create role outsider; end if; end $$;"
        + "".join(f"alter role {role} login;" for role in ROLES),
    )


@pytest.fixture(scope="session")
def roles_database(postgres: Server, migrated_template: str) -> str:
    """The name of a database with a small fleet and the roles; nothing is committed to it."""
    postgres.psql("postgres", f"create database roles template {migrated_template}")
    give_roles(postgres, "roles")
    postgres.psql("roles", FLEET)
    return "roles"


@pytest.fixture
async def as_role(postgres: Server, roles_database: str) -> AsyncIterator[Callable[[str], Any]]:
    """A function that opens a session of a role, in a transaction that is rolled back."""
    opened: list[asyncpg.Connection] = []

    async def open_session(role: str) -> asyncpg.Connection:
        session = await asyncpg.connect(postgres.dsn(roles_database, role))
        opened.append(session)
        await session.transaction().start()
        return session

    yield open_session
    for session in opened:
        await session.close()


async def forbidden(session: asyncpg.Connection, sql: str) -> str:
    with pytest.raises(asyncpg.InsufficientPrivilegeError) as caught:
        async with session.transaction():
            await session.execute(sql)
    return str(caught.value.args[0])


TO_NOBODY = [
    *(f"truncate {table} cascade" for table in (*TABLES, *OTHERS_ON_RECORD, "audit", "change")),
    *(f"alter table {table} disable trigger all" for table in (*TABLES, *OTHERS_ON_RECORD, "audit")),
    "alter table device disable trigger change_u",
    "drop trigger audit_u on device",
    "alter table device drop constraint device_status",
    "drop table device",
    "set session_replication_role = replica",
    "set local session_replication_role = replica",
    "alter role current_user set session_replication_role = replica",
    "create rule silent as on update to device do instead nothing",
    "copy audit from program 'true'",
    "create publication p for table audit",
    "select setval('audit_id_seq', 1)",
    "call public.audit_watch('device', 'device', 'status')",
    "update audit set actor = 'x'",
    "delete from audit",
    "insert into audit (operation, entity) values ('UPDATE', 'device')",
    "insert into change (entity, key) values ('device', 'd1')",
    "update change set key = 'x'",
    "delete from change",
    "update change_floor set floor = '0'",
    "insert into change_horizon (horizon) values ('0')",
    "update incarnation set id = gen_random_uuid()",
    "update identity_guard set writers = 0",
    "insert into schema_migrations (version) values ('1')",
    "create or replace function public.topic_filter_fault(filter text) returns text language sql as 'select null'",
    "create table public.mine (x int)",
    "call public.change_watch('device', 'device', 'status')",
    "set role postgres",
    "alter role authbackend_reader superuser",
]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("statement", TO_NOBODY)
async def test_no_role_can_hide_or_forge_a_change(as_role: Callable[[str], Any], role: str, statement: str) -> None:
    await forbidden(await as_role(role), statement)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    "function", ["audit_note('device', 'device_id')", "change_note('device', 'device_id')", "identity_check('alone')"]
)
async def test_no_role_can_borrow_a_trigger_for_a_table_of_its_own(
    as_role: Callable[[str], Any], role: str, function: str
) -> None:
    session = await as_role(role)
    await session.execute("create temp table mine (device_id text, status text)")
    await forbidden(
        session,
        f"create trigger t after insert on mine referencing new table as new_rows for each statement execute function public.{function}",
    )


@pytest.mark.parametrize("role", [SERVICE, READER, OUTSIDER])
@pytest.mark.parametrize(
    "statement",
    [
        "insert into device (device_id, type) values ('d9', 'agv')",
        "insert into account (name, login) values ('x', 'password')",
        "insert into topic_rule (device_type, effect, action, topic) values ('agv', 'allow', 'publish', '#')",
        "update device set status = 'active'",
        "update account set password_hash = null",
        "update topic_rule set effect = 'allow'",
        "delete from device",
        "delete from topic_rule",
        "select from device for update",
        "lock table device in share row exclusive mode",
    ],
)
async def test_only_the_admin_edits(as_role: Callable[[str], Any], role: str, statement: str) -> None:
    await forbidden(await as_role(role), statement)


@pytest.mark.parametrize("role", ROLES)
async def test_only_its_owner_forgets_the_trail(as_role: Callable[[str], Any], role: str) -> None:
    await forbidden(await as_role(role), "select audit_forget('2 years')")


@pytest.mark.parametrize("role", [role for role in ROLES if role != ADMIN])
async def test_only_the_security_team_forgets_certificates(as_role: Callable[[str], Any], role: str) -> None:
    await forbidden(await as_role(role), "select certificate_forget('2 years')")
    assert await (await as_role(ADMIN)).fetchval("select certificate_forget('2 years')") == 0


@pytest.mark.parametrize("role", [ADMIN, READER, OUTSIDER])
async def test_only_the_service_prunes(as_role: Callable[[str], Any], role: str) -> None:
    await forbidden(await as_role(role), "select change_prune('0 s')")


@pytest.mark.parametrize("role", [READER, OUTSIDER])
@pytest.mark.parametrize(
    "statement",
    [
        "select password_hash from account",
        "select * from account",
        "select to_jsonb(a) from account a",
        "copy account to stdout",
        "select count(*) from account where password_hash like '$argon2id$v=19$m=6%'",
        "select stavalues1 from pg_catalog.pg_statistic",
    ],
)
async def test_the_reader_cannot_read_a_hash(as_role: Callable[[str], Any], role: str, statement: str) -> None:
    await forbidden(await as_role(role), statement)


async def test_the_reader_reads_everything_else(as_role: Callable[[str], Any]) -> None:
    session = await as_role(READER)
    assert await session.fetchval("select count(*) from device") == 2
    assert await session.fetchval("select count(*) from device_type natural join (select) as x") == 1
    assert await session.fetchval("select topic from topic_rule") == "fleet/{device_id}/#"
    assert await session.fetchval("select login from account where name = 'robot'") == "password"
    whole = await session.fetchval("select string_agg(audit::text, '') from audit")
    assert "robot" in whole
    assert "argon2id" not in whole


@pytest.mark.parametrize("role", [SERVICE, OUTSIDER])
async def test_the_trail_is_for_admin_and_reader(as_role: Callable[[str], Any], role: str) -> None:
    await forbidden(await as_role(role), "select count(*) from audit")


@pytest.mark.parametrize("table", [*TABLES, "audit", "change", "incarnation", "certificate", "authority", "crl"])
async def test_a_role_that_was_given_nothing_reads_nothing(as_role: Callable[[str], Any], table: str) -> None:
    await forbidden(await as_role(OUTSIDER), f"select count(*) from {table}")


async def test_the_admins_edits_are_told_under_its_name(as_role: Callable[[str], Any]) -> None:
    session = await as_role(ADMIN)
    await session.execute("update device set status = 'revoked' where device_id = 'd1'")
    row = await session.fetchrow("select role, key, after from audit order by id desc limit 1")
    assert (row["role"], row["key"], json.loads(row["after"])["status"]) == (ADMIN, "d1", "revoked")
    assert await session.fetchval("select count(*) from change where txid = pg_current_xact_id()") == 1


@pytest.mark.parametrize("role", [SERVICE, READER, OUTSIDER])
@pytest.mark.parametrize(
    "statement",
    [
        "insert into certificate select * from certificate",
        "update certificate set device_id = null",
        "delete from certificate",
        "insert into authority select * from authority",
        "update authority set certificate_pem = ''",
        "delete from crl",
    ],
)
async def test_only_the_admin_writes_certificates(as_role: Callable[[str], Any], role: str, statement: str) -> None:
    await forbidden(await as_role(role), statement)


@pytest.mark.parametrize("role", [ADMIN, SERVICE])
async def test_who_signs_can_replace_a_list_and_not_put_back_an_older_one(
    as_role: Callable[[str], Any], role: str
) -> None:
    session = await as_role(role)
    stored = StoredCrl(*await session.fetchrow("select number::bigint, this_update, next_update, der from crl"))
    await save_crl(session, "fleet", replace(stored, number=6, der=b"x"), ["1f"])
    with pytest.raises(asyncpg.CheckViolationError, match="older than number 6"):
        await save_crl(session, "fleet", stored, [])


@pytest.mark.parametrize("role", [READER, OUTSIDER])
async def test_nobody_else_replaces_a_list(as_role: Callable[[str], Any], role: str) -> None:
    await forbidden(await as_role(role), "update crl set number = 6")


@pytest.mark.parametrize("role", [ADMIN, SERVICE, READER])
async def test_certificates_are_no_secret_to_the_roles(as_role: Callable[[str], Any], role: str) -> None:
    session = await as_role(role)
    for table in ("certificate", "authority", "crl"):
        assert await session.fetchval(f"select count(*) from {table}") == 1


# --- each can do its work ------------------------------------------------------------------------------------------


async def test_the_service_role_follows_the_registry_and_prunes(
    postgres: Server, database: str, connection: asyncpg.Connection
) -> None:
    give_roles(postgres, database)
    await connection.execute("delete from incarnation")  # as after a crash; the service writes a new one
    await connection.execute(FLEET)
    feed = ChangeFeed(Target(postgres.dsn(database, SERVICE)), change_retention_s=0)
    try:
        async with feed.wake_ups() as next_change:
            store = new_store()
            feed_read = await feed.load(store, 1.0)
            assert store.sizes() == {"device": 2, "device_type": 1, "account": 1}
            with store.reader() as reader:
                account = reader.account("robot")
            assert account is not None
            assert account.password_hash == HASH
            await connection.execute("update device set status = 'revoked' where device_id = 'd1'")
            await next_change()
            changes = await feed.changes(feed_read.position, 2)
            assert changes is not None
            assert list(changes[0].devices) == ["d1"]
            store.apply(*changes[:1], changes[1].position, 2.0)
            confirmed = await feed.confirm(changes[1].position, 2, await feed.suspects(store))
            assert confirmed is not None
            assert len(confirmed.patch) == len(confirmed.present) == 0
            assert await connection.fetchval("select count(*) from change") > 0
            await feed.prune()
            await connection.execute("select pg_current_xact_id()")
            await feed.prune()
            assert await connection.fetchval("select count(*) from change") == 0
    finally:
        await feed.close()


async def test_the_admin_and_no_other_role_can_be_missing_a_right_without_a_clear_message(
    postgres: Server, roles_database: str
) -> None:
    from authbackend.errors import Forbidden
    from authbackend.postgres import registry_edits

    with pytest.raises(Forbidden, match="the database role may not do this: permission denied for table device"):
        await registry_edits.set_device_status(Target(postgres.dsn(roles_database, READER)), "eve", "d1", "revoked", "")


@pytest.fixture
def edited(postgres: Server, migrated_template: str) -> Iterator[str]:
    """A database with the roles, to which a synchronous test may commit."""
    name = "edited_by_admin"
    postgres.psql("postgres", f"create database {name} template {migrated_template}")
    give_roles(postgres, name)
    yield name
    postgres.psql("postgres", f"drop database {name} with (force)")


def test_the_admin_role_suffices_for_every_command(
    postgres: Server, edited: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTHBACKEND_DATABASE__DSN", postgres.dsn(edited, ADMIN))
    monkeypatch.setenv("AUTHBACKEND_ACTOR", "ann")
    password = tmp_path / "password"
    password.write_text("correct horse battery\n", encoding="utf-8")
    policy = tmp_path / "policy.yaml"

    def command(line: str, code: int = 0) -> Result:
        result = CliRunner().invoke(main, shlex.split(line), catch_exceptions=False)
        assert result.exit_code == code, f"{line}: {result.output}"
        return result

    postgres.psql(
        edited, "insert into device_type (name, client_ids, vhosts) values ('agv', array['{device_id}'], array['/'])"
    )
    command("device add d1 --type agv --attribute site=north --expires 2031-01-01")
    command("device add d2 --type agv --status pending --common-name 'Number 2'")
    command("device list --json")
    command("device show d1")
    command("device suspend d1 --reason dusty")
    command("device revoke d1 --reason stolen")
    command("device reinstate d1 --reason found")
    command(f"account add robot --tag monitoring --password-file {password}")
    command(f"account passwd robot --password-file {password}")
    command("account add press --login certificate --client-id press-1")
    command("account list")
    monkeypatch.setenv("AUTHBACKEND_CA_PASSPHRASE", "correct horse battery")
    monkeypatch.setenv("AUTHBACKEND_CA_ROOT_PASSPHRASE", "staple in a vault")
    monkeypatch.chdir(tmp_path)
    command("ca init ca --name fleet")
    command("ca issue-server ca --name rabbitmq")
    command("device enroll d1 --ca ca --generate")
    command("cert import d1.pem")
    command("cert list --expiring 30d")
    command("cert revoke --device d1 --all --ca ca")
    command("crl sign ca")
    command("crl list")
    command(f"policy export -o {policy}")
    assert "nothing to change" in command(f"policy apply {policy} --prune").output
    text = policy.read_text(encoding="utf-8").replace("Number 2", "Number two")
    policy.write_text(text, encoding="utf-8")
    assert "Number two" in command(f"policy plan {policy}").output
    assert "applied 1 changes" in command(f"policy apply {policy}").output
    command("explain d1 publish fleet/d1/x", code=6)
    command("enforcement retry")
    command("enforcement pause")
    command("enforcement resume")
    command("enforcement forget nowhere", code=3)
    command("replicas forget nobody", code=3)
    command("enforcement disable")

    async def trail() -> list[tuple[str, str, str]]:
        async with connected(postgres.dsn(edited)) as connection:
            rows = await connection.fetch(
                "select role, claimed_by, key from audit where claimed_by is not null and entity <> 'crl_listed' order by id"
            )
            return [tuple(row) for row in rows]

    told = run(trail())
    assert {(role, who) for role, who, _ in told} == {(ADMIN, "ann")}
    others = [
        key for *_, key in told if len(key) < 64 and key not in ("fleet", "bulk")
    ]  # without fingerprints, the authority and the pause
    assert others == ["d1", "d2", "d1", "d1", "d1", "robot", "robot", "press", "d2"]


def test_the_script_can_be_run_again(postgres: Server, edited: str) -> None:
    before = postgres.psql(
        edited, "select relname, relacl from pg_class where relnamespace = 'public'::regnamespace order by 1"
    )
    give_roles(postgres, edited)
    assert before == postgres.psql(
        edited, "select relname, relacl from pg_class where relnamespace = 'public'::regnamespace order by 1"
    )
