"""Attacks that once got past the checks in the database, and must stay blocked."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from tests.postgres.test_roles import ADMIN, FLEET, give_roles
from tests.support.postgres import Server, connected, until

SHADOW = """
create function pg_temp.evil(v pg_catalog.text) returns boolean language plpgsql as $$ begin
  if current_user <> session_user then execute 'alter role authbackend_admin superuser'; end if; return true; end $$;
create domain pg_temp.text as pg_catalog.text check (pg_temp.evil(value));
"""


async def test_a_role_cannot_slip_its_own_types_under_the_owners_functions(postgres: Server, database: str) -> None:
    give_roles(postgres, database)
    postgres.psql(database, FLEET)
    async with connected(postgres.dsn(database, ADMIN)) as session:
        await session.execute(SHADOW)
        await session.execute("insert into account (name, login) values ('zz', 'certificate')")
        await session.execute("update device_type set name = 'T2' where name = 'agv'")
        await session.execute(
            "insert into topic_rule (account, effect, action, topic) values ('zz', 'allow', 'publish', 'x')"
        )
        await session.execute("update device set status = 'revoked'")
        assert not await session.fetchval("select rolsuper from pg_roles where rolname = current_user")


async def test_every_function_looks_for_temporary_names_last(connection: asyncpg.Connection) -> None:
    """PostgreSQL searches pg_temp first unless search_path names it."""
    found = await connection.fetch(
        "select proname, proconfig from pg_proc where pronamespace = 'public'::regnamespace and prokind in ('f', 'p')"
    )
    assert len(found) > 20
    open_to_shadows = [
        row["proname"]
        for row in found
        if not any(
            setting.startswith("search_path=") and setting.endswith("pg_temp") for setting in row["proconfig"] or []
        )
    ]
    assert open_to_shadows == []


async def test_two_halves_of_a_forbidden_account_cannot_commit_at_once(dsn: str) -> None:
    """One transaction gives the account a rule on an exchange, the other the right to write to it."""
    async with connected(dsn) as one, connected(dsn) as other, connected(dsn) as watching:
        await one.execute("insert into account (name, login, configure) values ('mach', 'certificate', '{q*}')")
        rule = "insert into topic_rule (account, effect, action, topic, exchange) values ('mach', 'allow', 'publish', 'x', 'events')"
        first = one.transaction()
        await first.start()
        await one.execute(rule)
        second = asyncio.create_task(other.execute("update account set write = '{events}' where name = 'mach'"))

        async def waits() -> bool:
            waiting = "select wait_event_type = 'Lock' from pg_stat_activity where pid = $1"
            return bool(await watching.fetchval(waiting, other.get_server_pid()))

        await until(waits, "the second half waits for the first")
        await first.commit()
        with pytest.raises(asyncpg.CheckViolationError, match="dead-lettering"):
            await second


async def test_an_account_with_a_fault_stands_in_nobody_elses_way(connection: asyncpg.Connection) -> None:
    await connection.execute("alter table account disable trigger all")
    await connection.execute(
        "insert into account (name, login, configure, write) values ('bad', 'certificate', '{q*}', '{amq.topic}')"
    )
    await connection.execute(
        "alter table account enable always trigger dead_lettering_i, enable always trigger dead_lettering_u"
    )
    await connection.execute("insert into account (name, login) values ('good', 'certificate')")
    with pytest.raises(asyncpg.CheckViolationError, match="dead-lettering"):
        await connection.execute("update account set login = 'certificate' where name = 'bad'")


async def test_a_revocation_waits_for_no_open_change_of_an_account(dsn: str) -> None:
    async with connected(dsn) as one, connected(dsn) as other:
        await one.execute(FLEET)
        async with one.transaction():
            await one.execute("update account set tags = '{monitoring}'")
            await other.execute("set lock_timeout = '1s'")
            await other.execute("update device set status = 'revoked' where device_id = 'd1'")
        assert await other.fetchval("select status from device where device_id = 'd1'") == "revoked"
