"""The brake refuses a transaction that takes something from too many at once, whoever writes, unless that is accepted."""

from __future__ import annotations

import asyncio
import json

import asyncpg
import pytest

from tests.support.postgres import connected

FLEET = """
delete from brake; -- back to the defaults
insert into device_type (name, client_ids, vhosts) values ('T', '{"{device_id}","{device_id}_*"}', '{/,v}'), ('U', '{"{device_id}"}', '{/}');
insert into topic_rule (device_type, effect, action, topic) values ('T', 'allow', 'publish', 'a/{attr.site}/#'), ('T', 'allow', 'publish', 'b');
insert into device (device_id, type, attributes) select 'D' || n, 'T', '{"site": "x"}' from generate_series(1, 1000) n;
insert into certificate (fingerprint, serial, issuer, subject, common_name, not_before, not_after, device_id)
select lpad(to_hex(n), 64, '0'), to_hex(n), 'CN=ca', 'CN=D' || n, 'D' || n, now(), now() + interval '1 year', 'D' || n from generate_series(1, 1000) n;
insert into account (name, login, vhosts, tags) select 'A' || n, 'certificate', '{/}', '{}' from generate_series(1, 200) n;
"""


@pytest.fixture
async def sql(scratch: asyncpg.Connection) -> asyncpg.Connection:
    await scratch.execute(FLEET)
    await scratch.execute(
        "select set_config('authbackend.impact', '', true)"
    )  # changes of the fixture do not count for the test
    return scratch


async def refused(sql: asyncpg.Connection, *statements: str) -> str:
    """Run statements in one transaction, the last of which is refused, and return the message."""
    async with sql.transaction():
        for each in statements[:-1]:
            await sql.execute(each)
        with pytest.raises(asyncpg.CheckViolationError) as caught:
            async with sql.transaction():
                await sql.execute(statements[-1])
    return str(caught.value.args[0])


MASS = {
    "revoked": "update device set status = 'revoked'",
    "suspended": "update device set status = 'suspended'",
    "pending": "update device set status = 'pending'",
    "deleted": "delete from device",
    "expiring sooner": "update device set expires_at = now() - interval '1 day'",
    "retyped": "update device set type = 'U'",
    "renamed": "update device set common_name = common_name || '-old'",
    "with other attributes": 'update device set attributes = \'{"site": "y"}\'',
    "of a type that is narrowed": "update device_type set vhosts = '{/}' where name = 'T'",
    "whose rules are narrowed": "delete from topic_rule where topic = 'b'",
    "whose certificate is revoked": "update certificate set state = 'revoked', reason = 'keyCompromise'",
    "scheduled to be revoked": "insert into device_schedule (device_id, at, status) select device_id, now() + interval '1 day', 'revoked' from device",
}


@pytest.mark.parametrize("cause", MASS)
async def test_what_would_take_something_from_a_whole_fleet_is_refused(sql: asyncpg.Connection, cause: str) -> None:
    said = await refused(sql, MASS[cause])
    assert said.startswith(
        f"this transaction would take something from 1000 devices, accounts or certificates, of 1000 devices: 1000 {cause} (D1, D10, D100, …)."
    )
    assert said.endswith("select accept_impact(1000) in the same transaction, or --accept-impact 1000")
    assert await sql.fetchval("select count(*) from device where status = 'active' and type = 'T'") == 1000


@pytest.mark.parametrize(
    "change",
    [
        "update device_type set client_ids = '{\"{device_id}\"}' where name = 'T'",
        "update device_type set networks = '{10.0.0.0/8}' where name = 'T'",
        "update device_type set max_staleness_s = 60 where name = 'T'",
        "update device_type set require_known_certificate = true where name = 'T'",
        "insert into topic_rule (device_type, effect, action, topic) values ('T', 'deny', 'publish', 'b')",
        "update topic_rule set topic = 'c' where topic = 'b'",
        "truncate topic_rule",
        "insert into topic_rule (device_id, effect, action, topic) select device_id, 'deny', 'publish', 'b' from device",
        "delete from account",
        "update account set tags = '{monitoring}', configure = '{^$}', vhosts = '{v}'",
        "truncate account cascade",
    ],
)
async def test_so_is_every_other_way_to_narrow(sql: asyncpg.Connection, change: str) -> None:
    assert "take something from" in await refused(sql, change)


@pytest.mark.parametrize(
    "change",
    [
        "update device set status_reason = 'x', attributes = attributes || '{\"other\": \"1\"}'",
        "update device set expires_at = now() + interval '9 years' where false",
        "update device_type set vhosts = vhosts || '{w}'::text[], description = 'x'",
        "insert into topic_rule (device_type, effect, action, topic) values ('T', 'allow', 'publish', 'c')",
        "update topic_rule set note = 'x'",
        "insert into device (device_id, type) select 'N' || n, 'T' from generate_series(1, 5000) n",
        "update device set status = 'revoked' where device_id in (select 'D' || n from generate_series(1, 100) n)",
        "update device set device_id = device_id where true",
    ],
)
async def test_what_takes_nothing_from_many_is_not(sql: asyncpg.Connection, change: str) -> None:
    await sql.execute(change)


async def test_several_statements_and_kinds_are_counted_together_and_each_device_once(sql: asyncpg.Connection) -> None:
    some = "device_id in (select 'D' || n from generate_series({}, {}) n)"
    await sql.execute("update device set status = 'suspended' where " + some.format(1, 60))
    await sql.execute("update device set status = 'revoked' where " + some.format(1, 60))
    await sql.execute("update device set type = 'U' where " + some.format(1, 100))
    for n in range(1, 61):
        await sql.execute("update device set status_reason = $1 where device_id = $2", "again", f"D{n}")
    said = await refused(sql, "delete from device where " + some.format(101, 101))
    assert (
        "from 101 devices, accounts or certificates, of 1000 devices: 60 suspended (D1, D10, D11, …), 40 retyped (D100, D61, D62, …), 1 deleted (D101)"
        in said
    )


async def test_five_percent_of_many_are_not_many(sql: asyncpg.Connection) -> None:
    await sql.execute("insert into device (device_id, type) select 'N' || n, 'T' from generate_series(1, 9000) n")
    await sql.execute(
        "update device set status = 'revoked' where device_id in (select 'D' || n from generate_series(1, 500) n)"
    )
    assert "from 501 devices, accounts or certificates, of 10000" in await refused(
        sql, "delete from device where device_id = 'N1'"
    )


@pytest.mark.parametrize("number", ["null", "-1"])
async def test_accepting_no_number_says_what_the_number_is(sql: asyncpg.Connection, number: str) -> None:
    said = await refused(sql, f"select accept_impact({number})")
    assert said == (
        "accept_impact() needs how many devices, accounts and certificates something may be taken from; "
        "the refused statement names the number"
    )


async def test_what_is_meant_is_accepted_up_to_the_number_and_the_trail_says_both(dsn: str) -> None:
    async with connected(dsn) as sql:
        await sql.execute(FLEET)
        async with sql.transaction():
            await sql.execute("select accept_impact(300)")
            await sql.execute(
                "update device set status = 'suspended' where device_id in (select 'D' || n from generate_series(1, 250) n)"
            )
            with pytest.raises(asyncpg.CheckViolationError, match="from 1000 devices"):
                async with sql.transaction():
                    await sql.execute("delete from device")
        after = await sql.fetch("select after from audit where operation = 'ACCEPT'")
        assert [json.loads(row["after"]) for row in after] == [{"accepted": 300, "touched": 250}]
        with pytest.raises(asyncpg.CheckViolationError, match="from 750 devices"):
            await sql.execute("update device set status = 'suspended' where status = 'active'")
        assert await sql.fetchval("select count(*) from brake_acceptance") == 0


async def test_a_part_that_was_rolled_back_does_not_count(sql: asyncpg.Connection) -> None:
    savepoint = sql.transaction()
    await savepoint.start()
    await sql.execute(
        "update device set status = 'suspended' where device_id in (select 'D' || n from generate_series(1, 100) n)"
    )
    await savepoint.rollback()
    await sql.execute(
        "update device set status = 'suspended' where device_id in (select 'D' || n from generate_series(101, 200) n)"
    )


async def test_transactions_at_the_same_time_neither_count_together_nor_wait(dsn: str) -> None:
    async with connected(dsn) as sql:
        await sql.execute(FLEET)

    async def part(first: int) -> None:
        async with connected(dsn) as own, own.transaction():
            await own.execute("set local lock_timeout = '2s'")
            await own.execute(
                f"update device set status = 'suspended' where device_id in (select 'D' || n from generate_series({first}, {first + 89}) n)"
            )
            begun.append(first)
            if len(begun) == 4:
                all_begun.set()
            await all_begun.wait()

    begun: list[int] = []
    all_begun = asyncio.Event()
    await asyncio.gather(*(part(first) for first in (1, 101, 201, 301)))
    async with connected(dsn) as sql:
        assert await sql.fetchval("select count(*) from device where status = 'suspended'") == 360
        await sql.execute("update device set status = 'suspended' where device_id = 'D999'")
        assert await sql.fetchval("select count(*) from brake_impact") == 1  # rows of ended transactions are deleted


async def test_what_a_session_planned_for_few_rows_reads_many_only_once(dsn: str) -> None:
    """PostgreSQL keeps the plans of a session, and the table is nearly empty most of the time."""
    async with connected(dsn) as sql:
        await sql.execute(FLEET)
        await sql.execute("insert into brake (devices) values (1000000)")
        await sql.execute("insert into device (device_id, type) select 'M' || n, 'T' from generate_series(1, 4000) n")
        await sql.execute("update device set status = 'suspended' where device_id = 'D1'")
        await sql.execute("vacuum analyze brake_impact")
    async with connected(dsn) as sql:
        for n in range(2, 22):
            await sql.execute(f"update device set status = 'suspended' where device_id = 'D{n}'")
        before = await rows_read(sql)
        await sql.execute("update device_type set vhosts = '{/}' where name = 'T'")
        assert 5000 <= await rows_read(sql) - before <= 10 * 5000


async def rows_read(sql: asyncpg.Connection) -> int:
    """Return how many rows of the table have been read, by any plan."""
    await sql.execute("select pg_stat_force_next_flush()")
    return await sql.fetchval(
        "select seq_tup_read + coalesce(idx_tup_fetch, 0) from pg_stat_user_tables where relname = 'brake_impact'"
    )


async def test_time_neither_trips_it_nor_jams_on_it(dsn: str) -> None:
    async with connected(dsn) as sql:
        await sql.execute(FLEET)
        async with sql.transaction():
            await sql.execute("select accept_impact(1000)")
            await sql.execute(
                "insert into device_schedule (device_id, at, status) select device_id, clock_timestamp(), 'suspended' from device"
            )
        assert tuple(await sql.fetchrow("select * from device_schedule_apply()")) == (1000, None)
        assert await sql.fetchval("select count(*) from device where status = 'suspended'") == 1000
        assert await sql.fetchval("select count(*) from audit where operation = 'ACCEPT'") == 1


async def test_copy_is_counted_like_everything_else(dsn: str) -> None:
    async with connected(dsn) as sql:
        await sql.execute(FLEET)
        rows = [(f"D{n}", "deny", "publish", "b") for n in range(1, 1001)]
        with pytest.raises(asyncpg.CheckViolationError, match="from 1000 devices"):
            await sql.copy_records_to_table(
                "topic_rule", records=rows, columns=["device_id", "effect", "action", "topic"]
            )


async def test_the_limits_are_in_the_trail(sql: asyncpg.Connection) -> None:
    await sql.execute("insert into brake (devices) values (10)")
    after = await sql.fetchval("select after from audit where entity = 'brake' order by id desc limit 1")
    assert json.loads(after) == {"one": True, "devices": 10, "percent": 5}
    assert "More than 10 and more than 5" in await refused(
        sql, "update device set status = 'suspended' where device_id in (select 'D' || n from generate_series(1, 60) n)"
    )
