"""Limits on what grows with time: the audit trail, certificates that ended long ago, and reports of brokers' hosts."""

from __future__ import annotations

import json

import asyncpg
import pytest

OLD = "alter table audit alter at set default clock_timestamp() - interval '{}'"


async def write(connection: asyncpg.Connection, age: str, *types: str) -> None:
    """Write an audit row of this age for each type."""
    await connection.execute(OLD.format(age))
    for name in types:
        await connection.execute("insert into device_type (name) values ($1)", name)
    await connection.execute("alter table audit alter at set default clock_timestamp()")


async def keys(connection: asyncpg.Connection) -> list[str | None]:
    return [row["key"] for row in await connection.fetch("select key from audit order by id")]


async def test_the_oldest_rows_of_the_trail_go_in_parts_and_the_trail_says_so(scratch: asyncpg.Connection) -> None:
    await write(scratch, "3 years", "a", "b", "c")
    await write(scratch, "1 year", "d")
    assert await scratch.fetchval("select audit_forget('2 years', 2)") == 2
    assert await keys(scratch) == ["c", "d", None]
    assert await scratch.fetchval("select audit_forget('2 years', 2)") == 1
    assert await scratch.fetchval("select audit_forget('2 years', 2)") == 0
    row = await scratch.fetchrow("select * from audit order by id desc limit 1")
    assert (row["operation"], row["entity"], row["actor"]) == ("FORGET", "audit", "postgres")
    told = json.loads(row["before"])
    assert told["rows"] == 1
    assert told["from"] == told["until"]
    assert await keys(scratch) == ["d", None, None]


@pytest.mark.parametrize("kept", ["null", "'0 s'", "'89 days'", "'-1 year'"])
async def test_the_last_90_days_of_the_trail_cannot_be_forgotten(scratch: asyncpg.Connection, kept: str) -> None:
    await write(scratch, "80 days", "a")
    with pytest.raises(asyncpg.CheckViolationError, match="keeps the last 90 days"):
        async with scratch.transaction():
            await scratch.execute(f"select audit_forget({kept})")
    assert await scratch.fetchval("select audit_forget('90 days')") == 0
    assert await keys(scratch) == ["a"]


async def test_forgetting_opens_no_door_to_the_trail(scratch: asyncpg.Connection) -> None:
    await write(scratch, "3 years", "a")
    assert await scratch.fetchval("select audit_forget('2 years')") == 1
    for statement in ("delete from audit", "update audit set actor = 'x'", "truncate audit"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="append-only"):
            async with scratch.transaction():
                await scratch.execute(statement)


CERTIFICATES = """
insert into device_type (name) values ('T');
insert into device (device_id, type) values ('D', 'T'), ('E', 'T');
insert into certificate (fingerprint, serial, issuer, subject, common_name, not_before, not_after, device_id, state, reason, key_fingerprint)
select repeat(serial, 64), serial, 'CN=CA', 'CN=x', 'x', now() - interval '9 years', now() - ends::interval, device, state, reason, repeat(serial, 64)
from (values ('1', '3 years', 'D', 'active', ''), ('2', '2 years', 'D', 'revoked', 'superseded'), ('3', '1 year', 'D', 'active', ''),
             ('4', '3 years', 'E', 'active', ''), ('5', '3 years', null, 'active', ''), ('6', '3 years', null, 'revoked', 'keyCompromise'),
             ('7', '3 years', null, 'revoked', 'superseded')) as c (serial, ends, device, state, reason)
"""


async def serials(connection: asyncpg.Connection) -> str:
    return str(await connection.fetchval("select string_agg(serial, '' order by serial) from certificate"))


async def test_certificates_that_ended_long_ago_go_but_for_the_last_of_a_device_and_compromised_keys(
    scratch: asyncpg.Connection,
) -> None:
    await scratch.execute(CERTIFICATES)
    assert await scratch.fetchval("select certificate_forget('30 months', 2)") == 2
    assert await scratch.fetchval("select certificate_forget('30 months', 2)") == 1
    assert await scratch.fetchval("select certificate_forget('30 months', 2)") == 0
    assert await serials(scratch) == "2346"
    assert await scratch.fetchval("select certificate_forget('400 days')") == 1
    assert await serials(scratch) == "346"
    gone = "select count(*) from audit where entity = 'certificate' and operation = 'DELETE' and actor = 'postgres'"
    assert await scratch.fetchval(gone) == 4


@pytest.mark.parametrize("kept", ["null", "'1 year'"])
async def test_certificates_stay_for_as_long_as_a_list_may_name_them(scratch: asyncpg.Connection, kept: str) -> None:
    with pytest.raises(asyncpg.CheckViolationError, match="400 days"):
        async with scratch.transaction():
            await scratch.execute(f"select certificate_forget({kept})")


async def test_a_host_of_a_broker_cannot_fill_the_database_with_reports(scratch: asyncpg.Connection) -> None:
    async def report(issuer: str, number: int = 1) -> None:
        async with scratch.transaction():
            await scratch.execute("select crl_report('rabbit@mine', $1, $2, now() + interval '1 day')", issuer, number)

    await scratch.execute(
        """
        insert into crl_installed (node, issuer, number, next_update, counts_until)
        select 'rabbit@' || n, 'CN=CA', 1, now(), now() from generate_series(1, 9999) as n
        """
    )
    await report("CN=CA")
    with pytest.raises(asyncpg.CheckViolationError, match="crl hosts --forget NODE"):
        await report("CN=Another")
    await report("CN=CA", 2)  # a list reported before can still be updated
    assert await scratch.fetchval("select number from crl_installed where node = 'rabbit@mine'") == 2
    await scratch.fetchval("select crl_forget('rabbit@8')")
    await report("CN=Another")
    with pytest.raises(asyncpg.CheckViolationError, match="2048 bytes"):
        await report("CN=" + "x" * 2048)
