"""A replica follows a registry whose schema is newer than its program, or says why it does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest
from structlog.testing import capture_logs

from authbackend import __version__
from authbackend.errors import Unavailable
from authbackend.postgres import migrate as migrations
from authbackend.postgres.change_feed import ChangeFeed
from authbackend.postgres.compatibility import require_fit
from authbackend.postgres.connection import Target
from authbackend.postgres.partial_registry import load_partial
from tests.support.postgres import connected, until
from tests.support.registry import Following, copied, fleet, following

NEWER = """
create table device_group (id text primary key, note text);
call change_watch('device_group', 'device_group', 'id');
call audit_watch('device_group', 'device_group', 'id');
create table device_tag (device_id text, tag text);
call change_watch('device_tag', 'device', 'device_id', 'device_tag', 'tag');
alter table device add column device_group text references device_group (id), add column made_at timestamptz not null default now();
alter table device_type add column quota integer not null default 7;
alter table topic_rule add column qos smallint;
alter table account add column quota integer;
alter table replica add column zone text;
create trigger change_i2 after insert on device referencing new table as new_rows for each statement execute function change_note('device_group', 'device_group');
create trigger change_u2 after update on device referencing old table as old_rows new table as new_rows for each statement execute function change_note('device_group', 'device_group');
alter table device enable always trigger change_i2, enable always trigger change_u2;
insert into device_group (id) values ('north'), ('south');
update device set device_group = 'north' where device_id = 'd1';
"""


@pytest.fixture
async def ignored() -> list[int]:
    """The number of ignored changes of each read."""
    return []


@pytest.fixture
async def follower(dsn: str, connection: asyncpg.Connection, ignored: list[int]) -> AsyncIterator[Following]:
    await fleet(connection)
    async with copied(dsn, ChangeFeed(Target(dsn), on_ignored=ignored.append)) as loaded:
        yield loaded


async def test_what_a_newer_schema_adds_is_ignored_and_counted_while_a_replica_follows(
    dsn: str, follower: Following, ignored: list[int]
) -> None:
    async def revoked() -> bool:
        return follower.devices()["d2"][2] == "revoked"

    async def told() -> bool:
        return sum(ignored) == 3

    with capture_logs() as lines:
        async with following(follower.copy), connected(dsn) as owner:
            await owner.execute(NEWER)
            await owner.execute("insert into device_tag values ('d3', 'blue')")
            await owner.execute("update device set status = 'revoked' where device_id = 'd2'")
            await until(revoked, "the revocation is followed")
            await until(told, "the two groups and the tag were counted")
            assert await follower.copy.compare() == 0
    assert follower.copy.fault is None
    assert await follower.agrees()
    unknown = [line["entity"] for line in lines if line["event"] == "registry.entity_unknown"]
    assert sorted(unknown) == ["device_group", "device_tag"]  # one warning each


async def test_a_migration_that_locks_tables_in_another_order_than_a_look_is_not_ended_as_a_deadlock(
    dsn: str, follower: Following, connection: asyncpg.Connection
) -> None:
    async def waits() -> bool:
        return bool(await connection.fetchval("select count(*) from pg_locks where not granted"))

    await connection.execute(
        f'alter database "{await connection.fetchval("select current_database()")}" set deadlock_timeout = "1s"'
    )  # PostgreSQL's default
    await follower.feed.close()
    async with connected(dsn) as owner, owner.transaction():
        await owner.execute("set local deadlock_timeout = '700ms'")
        await owner.execute("alter table device add column zone text")
        feed_read = asyncio.create_task(follower.copy.refresh())
        await until(waits, "the look has device_type and wants device")
        await owner.execute("alter table device_type add column zone text")
        with pytest.raises(Unavailable, match="the registry cannot be read: its tables were locked for 500ms"):
            await feed_read
    await follower.copy.refresh()
    assert await follower.agrees()


async def test_a_table_that_is_not_known_is_emptied_without_a_new_load(
    follower: Following, connection: asyncpg.Connection, ignored: list[int]
) -> None:
    await connection.execute(NEWER)
    await follower.copy.refresh()
    ignored.clear()
    await connection.execute("truncate device_tag")
    refreshed = await follower.copy.refresh()
    # Tags are also noted as changes of devices, which this program knows: it cannot tell that they do not matter.
    assert refreshed.full
    await connection.execute("create table zone (id text); call change_watch('zone', 'zone', 'id'); truncate zone")
    assert not (await follower.copy.refresh()).full
    assert ignored == [1]


async def test_triggers_that_are_not_known_do_not_stand_in_for_one_that_is_missing(
    follower: Following, connection: asyncpg.Connection
) -> None:
    await connection.execute(NEWER)
    await connection.execute("alter table device disable trigger change_u")
    with pytest.raises(Unavailable, match="23 of 24 change triggers exist and are enabled"):
        await follower.copy.refresh()
    await connection.execute("alter table device enable always trigger change_u")
    await connection.execute("alter table device_group disable trigger change_u")
    await follower.copy.refresh()  # this program does not read that table


async def test_repairing_enables_the_triggers_of_tables_that_are_not_known(
    dsn: str, connection: asyncpg.Connection
) -> None:
    await connection.execute("create table zone (id text); call change_watch('zone', 'zone', 'id')")
    await connection.execute("alter table zone disable trigger user")
    await connection.execute("alter table enforcement_pause disable trigger user")
    assert await migrations.repair_triggers(Target(dsn)) >= 5
    assert await migrations.repair_triggers(Target(dsn)) == 0
    assert not await connection.fetchval(
        "select count(*) from pg_trigger where not tgisinternal and tgenabled <> 'A' and tgrelid in ('zone'::regclass, 'enforcement_pause'::regclass)"
    )


async def oldest(connection: asyncpg.Connection, version: str) -> None:
    """Apply a migration that sets the oldest version able to read the schema."""
    await connection.execute(
        f"create or replace function registry_oldest_program() returns text language sql stable set search_path = pg_catalog, pg_temp as $$ select '{version}' $$"
    )


async def test_a_program_that_would_misread_the_schema_keeps_its_copy_and_says_why(
    follower: Following, connection: asyncpg.Connection
) -> None:
    async with connection.transaction():
        await connection.execute("update device set status = 'revoked' where device_id = 'd1'")
        await oldest(connection, "99.0.0")
    for _ in range(2):
        with pytest.raises(Unavailable, match=rf"needs authbackend 99\.0\.0 or later, and this is {__version__}"):
            await follower.copy.refresh()
    assert follower.devices()["d1"][2] == "active"  # the copy is kept, becomes stale, and finally denies
    with pytest.raises(Unavailable, match=r"99\.0\.0 or later"):
        await load_partial(Target(follower.dsn), "d1", None)
    await oldest(connection, __version__)
    await follower.copy.refresh()
    assert follower.devices()["d1"][2] == "revoked"


async def test_a_newer_schema_without_a_table_of_today_says_why_too(
    follower: Following, connection: asyncpg.Connection
) -> None:
    await oldest(connection, "99.0.0")
    await connection.execute("drop table client_id_move cascade")
    with pytest.raises(Unavailable, match=r"needs authbackend 99\.0\.0 or later"):
        await follower.copy.refresh()


async def test_a_schema_that_changes_between_the_question_and_the_locks_is_not_decided_by(
    follower: Following, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    from authbackend.postgres import change_feed

    asked = 0

    def between(stated: str) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:  # the second read is after the locks, and sees what a migration did meanwhile
            require_fit(stated, "0.0.1")

    monkeypatch.setattr(change_feed, "require_fit", between)
    await connection.execute("update device set status = 'revoked' where device_id = 'd1'")
    with pytest.raises(Unavailable, match="or later, and this is 0\\.0\\.1"):
        await follower.copy.refresh()
    assert follower.devices()["d1"][2] == "active"


@pytest.mark.parametrize(
    ("needed", "program", "fits"),
    [
        ("0.1.0", "0.1.0", True),
        ("0.9.0", "0.10.0", True),
        ("0.10.0", "0.9.0", False),
        ("1.0.0", "1.0.0rc1", True),
        ("1.0.1", "1.0.0", False),
        ("next", "1.0.0", False),
        ("", "1.0.0", False),
    ],
)
def test_versions_are_compared_as_numbers_and_what_is_none_fits_nobody(needed: str, program: str, fits: bool) -> None:
    if fits:
        require_fit(needed, program)
    else:
        with pytest.raises(Unavailable):
            require_fit(needed, program)
