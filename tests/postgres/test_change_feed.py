"""The copy in memory follows every change, whatever the order, kind and size of commits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from authbackend.errors import Unavailable
from authbackend.postgres import registry_edits
from authbackend.postgres.change_feed import ChangeFeed
from authbackend.postgres.connection import Target
from authbackend.registry.follower import FeedRead, SyncTimes
from authbackend.registry.position import FeedPosition
from authbackend.registry.records import Patch
from tests.support.postgres import Server, connected, until
from tests.support.registry import DeafFeed, Following, copied, fleet, following, loaded

NEVER_S = 3600.0


@pytest.fixture
async def follower(dsn: str, connection: asyncpg.Connection) -> AsyncIterator[Following]:
    """A loaded copy of a small fleet, refreshed by hand."""
    await fleet(connection)
    async with copied(dsn) as loaded:
        assert await loaded.agrees()
        yield loaded


async def refresh(follower: Following) -> int:
    """Refresh by the change feed, not by a full load, and return how many rows were read."""
    refreshed = await follower.copy.refresh()
    assert not refreshed.full
    return refreshed.changed


async def follows(follower: Following) -> None:
    """Refresh by the change feed and compare the copy with the database."""
    await refresh(follower)
    assert await follower.agrees()


# --- commits in every order ------------------------------------------------------------------------------------------


async def test_a_change_that_is_committed_later_than_a_younger_one_is_not_missed(
    dsn: str, follower: Following, connection: asyncpg.Connection
) -> None:
    async with connected(dsn) as older:
        transaction = older.transaction()
        await transaction.start()
        await older.execute("update device set status = 'revoked' where device_id = 'd1'")
        await connection.execute("update device set status = 'revoked' where device_id = 'd2'")
        assert await refresh(follower) == 1
        assert follower.devices()["d1"][2] == "active"
        await connection.execute("update device set status = 'revoked' where device_id = 'd3'")
        assert await refresh(follower) == 1
        await transaction.commit()
        assert await refresh(follower) == 1
    assert {status for *_, status in follower.devices().values()} == {"revoked"}
    assert await follower.agrees()


async def test_commits_behind_a_long_transaction_are_read_once_each(
    postgres: Server, follower: Following, connection: asyncpg.Connection
) -> None:
    async with connected(postgres.dsn("postgres")) as stranger, stranger.transaction():  # even in another database
        await stranger.fetchval("select pg_current_xact_id()")
        for n in range(20):
            await connection.execute("update device set attributes = jsonb_build_object('n', $1::text)", str(n))
            assert await refresh(follower) == 3
        assert await refresh(follower) == 0
        assert await follower.agrees()


@pytest.mark.parametrize("end", ["release", "rollback to"])
async def test_changes_inside_savepoints_follow_what_becomes_of_them(
    dsn: str, follower: Following, connection: asyncpg.Connection, end: str
) -> None:
    async with connected(dsn) as writer:
        transaction = writer.transaction()
        await transaction.start()
        await writer.execute("savepoint one")
        await writer.execute("update device set status = 'revoked' where device_id = 'd1'")
        await writer.execute("savepoint two")
        await connection.execute("update device set status = 'suspended' where device_id = 'd3'")
        await refresh(follower)
        await writer.execute("update device set status = 'revoked' where device_id = 'd2'")
        await writer.execute(f"{end} two")
        await refresh(follower)
        await transaction.commit()
    await follows(follower)
    statuses = {key: status for key, (*_, status) in follower.devices().items()}
    assert statuses == {"d1": "revoked", "d2": "revoked" if end == "release" else "active", "d3": "suspended"}


async def test_what_is_rolled_back_never_reaches_the_copy(
    dsn: str, follower: Following, connection: asyncpg.Connection
) -> None:
    async with connected(dsn) as writer:
        transaction = writer.transaction()
        await transaction.start()
        await writer.execute("delete from device")
        assert await refresh(follower) == 0
        await transaction.rollback()
    assert await refresh(follower) == 0
    assert await follower.agrees()


@pytest.mark.parametrize("isolation", ["repeatable_read", "serializable"])
async def test_a_writer_with_an_old_snapshot_is_followed(
    dsn: str, follower: Following, connection: asyncpg.Connection, isolation: Any
) -> None:
    async with connected(dsn) as writer:
        transaction = writer.transaction(isolation=isolation)
        await transaction.start()
        await writer.fetchval("select count(*) from device")
        await connection.execute("update device set status = 'suspended' where device_id = 'd1'")
        await refresh(follower)
        await writer.execute("update device set status = 'revoked' where device_id = 'd2'")
        await refresh(follower)
        await transaction.commit()
    await follows(follower)
    assert follower.devices()["d2"][2] == "revoked"


async def test_a_prepared_transaction_is_refused_because_it_could_not_notify(connection: asyncpg.Connection) -> None:
    await fleet(connection)
    await connection.execute("begin")
    await connection.execute("update device set status = 'revoked'")
    with pytest.raises(asyncpg.FeatureNotSupportedError, match="cannot PREPARE a transaction that has executed"):
        await connection.execute("prepare transaction 'later'")
    assert await connection.fetchval("select count(*) from device where status = 'revoked'") == 0


# --- every kind of statement -----------------------------------------------------------------------------------------

STATEMENTS = {
    "insert": "insert into device (device_id, type) values ('n1', 'agv')",
    "insert with another common name": "insert into device (device_id, common_name, type) values ('n1', 'N 1', 'agv')",
    "upsert": "insert into device (device_id, type) values ('d1', 'agv'), ('n1', 'agv') on conflict (device_id) do update set status = 'revoked'",
    "merge": "merge into device d using (values ('d1'), ('n1')) w (id) on d.device_id = w.id when matched then delete when not matched then insert (device_id, type) values (w.id, 'agv')",
    "writing with": "with gone as (delete from device where device_id = 'd1' returning *) insert into device (device_id, type) select 'n1', type from gone",
    "delete": "delete from device where device_id = 'd1'",
    "key": "update device set device_id = 'n1', common_name = 'n1' where device_id = 'd1'",
    "key only": "update device set device_id = 'n1' where device_id = 'd1'",
    "common name": "update device set common_name = 'Number 1' where device_id = 'd1'",
    "keys moved on": "update device set device_id = device_id || '0', common_name = common_name || '0'",
    "type renamed": "update device_type set name = 'agv2'",
    "type changed": "update device_type set vhosts = '{/, other}', networks = '{10.0.0.0/8}'",
    "type added": "insert into device_type (name) values ('apm')",
    "account renamed": "update account set name = 'robot2'",
    "account deleted": "delete from account",
    "account changed": "update account set tags = '{monitoring}', client_ids = '{press}', networks = '{::1/128}'",
    "rule of a type": "insert into topic_rule (device_type, effect, action, topic) values ('agv', 'deny', 'publish', 'x')",
    "rule of a device": "insert into topic_rule (device_id, effect, action, topic) values ('d1', 'deny', 'publish', 'x')",
    "rule of an account": "insert into topic_rule (account, effect, action, topic, exchange) values ('robot', 'allow', 'publish', 'x', 'plant')",
    "rule changed": "update topic_rule set topic = 'y' where device_type is not null",
    "rule moved": "update topic_rule set device_type = null, device_id = 'd1' where device_type is not null",
    "rules deleted": "delete from topic_rule",
    "all devices deleted": "delete from device",
    "everything deleted": "delete from topic_rule; delete from device; delete from account; delete from device_type",
    "deleted and made again": "delete from device where device_id = 'd1'; insert into device (device_id, type, status) values ('d1', 'agv', 'pending')",
    "swapped at once": "update device set common_name = case device_id when 'd1' then 'd2' else 'd1' end where device_id in ('d1', 'd2')",
    "moved on by one": "update device set common_name = 'd' || (substr(device_id, 2)::int % 3 + 1)",
    "swapped names that differ from the ids": "update device set common_name = 'N' || device_id; update device set common_name = case device_id when 'd1' then 'Nd2' when 'd2' then 'Nd1' else 'N' end",
    "swapped": "update device set common_name = 'x' where device_id = 'd1'; update device set common_name = 'd1' where device_id = 'd2'; update device set common_name = 'd2' where device_id = 'd1'",
    "swapped in a ring": "update device set common_name = 'x' where device_id = 'd1'; update device set common_name = 'd1' where device_id = 'd2'; update device set common_name = 'd2' where device_id = 'd3'; update device set common_name = 'd3' where device_id = 'd1'",
    "handed on": "update device set common_name = 'old' where device_id = 'd1'; insert into device (device_id, common_name, type) values ('n1', 'd1', 'agv')",
    "name of a deleted device": "delete from device where device_id = 'd1'; update device set common_name = 'd1' where device_id = 'd2'",
}  # fmt: skip


@pytest.mark.parametrize(
    ("what", "together"),
    [(what, True) for what in STATEMENTS] + [(what, False) for what in STATEMENTS if "; " in STATEMENTS[what]],
)
async def test_every_way_to_change_something_is_followed(
    follower: Following, connection: asyncpg.Connection, what: str, together: bool
) -> None:
    if together:
        await connection.execute(STATEMENTS[what])
    else:
        for statement in STATEMENTS[what].split("; "):
            await connection.execute(statement)
            await follows(follower)
    await follows(follower)
    assert await refresh(follower) == 0


async def test_copy_is_followed(follower: Following, connection: asyncpg.Connection) -> None:
    records = [(f"c{n}", f"c{n}", "agv") for n in range(100)]
    await connection.copy_records_to_table("device", records=records, columns=("device_id", "common_name", "type"))
    assert await refresh(follower) == 100
    assert await follower.agrees()


@pytest.mark.parametrize(
    "statement", ["update device set status = 'revoked' where false", "delete from topic_rule where id < 0"]
)
async def test_a_statement_that_touches_nothing_changes_and_wakes_nobody(
    follower: Following, connection: asyncpg.Connection, statement: str
) -> None:
    async with follower.feed.wake_ups() as next_change:
        await connection.execute(statement)
        waiting = asyncio.ensure_future(next_change())
        assert await refresh(follower) == 0
        await connection.execute("select pg_notify('other', '')")
        await connection.fetchval("select 1")
        assert not waiting.done()
        await connection.execute("update device set status = 'revoked' where device_id = 'd1'")
        await asyncio.wait_for(waiting, 10)
    assert await refresh(follower) == 1


async def test_a_change_by_a_session_that_skips_ordinary_triggers_is_followed(
    follower: Following, connection: asyncpg.Connection
) -> None:
    await connection.execute("set session_replication_role = replica")
    await connection.execute("update device set status = 'revoked'")
    assert await refresh(follower) == 3
    await connection.execute("delete from device where device_id = 'd1'")
    await follows(follower)


@pytest.mark.parametrize("table", ["device_type", "device", "account", "topic_rule"])
async def test_truncate_leads_to_a_whole_load(follower: Following, connection: asyncpg.Connection, table: str) -> None:
    await connection.execute(f"truncate {table} cascade")
    assert (await follower.copy.refresh()).full
    assert await follower.agrees()
    assert await refresh(follower) == 0


async def test_a_bulk_change_of_100000_devices_is_followed(dsn: str, connection: asyncpg.Connection) -> None:
    await fleet(connection, 100_000)
    async with copied(dsn) as follower:
        await connection.execute("update device set status = 'suspended' where substr(device_id, 2)::int <= 15000")
        assert await refresh(follower) == 15_000  # few enough to patch
        assert [status for *_, status in follower.devices().values()].count("suspended") == 15_000
        assert await follower.copy.compare() == 0
        await connection.execute("update device set expires_at = '2001-01-01Z'")
        assert (await follower.copy.refresh()).full  # all of them, so a full load is cheaper
        assert {device.expires_at for device in follower.all_devices()} == {978307200.0}
        assert await follower.agrees()


# --- notifications ---------------------------------------------------------------------------------------------------


async def test_a_change_is_seen_at_once_without_waiting_for_the_poll(dsn: str, connection: asyncpg.Connection) -> None:
    await fleet(connection)
    follower = Following(dsn, times=SyncTimes(poll_s=NEVER_S))
    async with following(follower.copy):
        await listened(connection)
        await until_loaded(follower)
        await connection.execute("update device set status = 'revoked'")
        await until_revoked(follower)
    await follower.feed.close()


async def test_a_change_whose_notification_is_lost_is_seen_by_the_next_poll(
    dsn: str, connection: asyncpg.Connection
) -> None:
    await fleet(connection)
    follower = Following(dsn, DeafFeed(Target(dsn)), SyncTimes(poll_s=0.1))
    async with following(follower.copy):
        await until_loaded(follower)
        await connection.execute("update device set status = 'revoked'")
        await until_revoked(follower)
    await follower.feed.close()


async def test_a_killed_listener_loses_nothing_and_listens_again(dsn: str, connection: asyncpg.Connection) -> None:
    await fleet(connection)
    follower = Following(dsn, times=SyncTimes(poll_s=0.2))
    async with following(follower.copy):
        await until_loaded(follower)
        for n in range(3):
            listener = await listened(connection)
            async with connection.transaction():
                await connection.execute("update device set attributes = jsonb_build_object('n', $1::text)", str(n))
                await connection.execute("select pg_terminate_backend($1)", listener)

            async def seen(n: int = n) -> bool:
                device = follower.device("d1")
                return device is not None and device.attributes == {"n": str(n)}

            await until(seen, "the change is followed")
        await listened(connection)
        assert follower.copy.fault is None
    await follower.feed.close()


async def test_a_killed_reader_keeps_the_copy_and_follows_again(dsn: str, connection: asyncpg.Connection) -> None:
    await fleet(connection)
    follower = Following(dsn, times=SyncTimes(poll_s=0.1))
    async with following(follower.copy):
        await until_loaded(follower)
        await connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'authbackend'"
        )
        await connection.execute("update device set status = 'revoked'")
        await until_revoked(follower)
    assert [refreshed.full for refreshed in follower.observed.refreshes].count(True) == 1
    await follower.feed.close()


async def test_a_storm_of_commits_is_one_look_at_a_time_and_few_of_them(
    dsn: str, connection: asyncpg.Connection
) -> None:
    await fleet(connection)

    class Counting(ChangeFeed):
        now = most = 0
        some_more = asyncio.Event()
        all_are_made = False

        async def changes(self, position: FeedPosition, devices: int) -> tuple[Patch, FeedRead] | None:
            self.now += 1
            self.most = max(self.most, self.now)
            if not self.all_are_made:  # a slow read, during which changes go on
                await self.some_more.wait()
                self.some_more.clear()
            try:
                return await super().changes(position, devices)
            finally:
                self.now -= 1

    feed = Counting(Target(dsn))
    follower = Following(dsn, feed, SyncTimes(poll_s=NEVER_S))
    async with following(follower.copy):
        await listened(connection)
        await until_loaded(follower)
        for n in range(300):
            await connection.execute("update device set attributes = jsonb_build_object('n', $1::text)", str(n))
            if n % 10 == 9:
                feed.some_more.set()
        feed.all_are_made = True
        feed.some_more.set()
        await connection.execute("update device set status = 'revoked'")
        await until_revoked(follower)
    assert feed.most == 1
    assert len(follower.observed.refreshes) < 50  # for 301 changes
    assert await follower.agrees()
    await follower.feed.close()


async def listened(connection: asyncpg.Connection) -> int:
    """Wait until a session listens in this database, and return its process id."""
    found: list[int] = []

    async def listens() -> bool:
        found[:] = [
            row["pid"]
            for row in await connection.fetch(
                "select pid from pg_stat_activity where datname = current_database() and query ilike 'listen%' and state = 'idle'"
            )
        ]
        return bool(found)

    await until(listens, "somebody listens")
    return found[0]


async def until_loaded(follower: Following) -> None:
    async def loaded() -> bool:
        return follower.loaded

    await until(loaded, "the copy is loaded")


async def until_revoked(follower: Following) -> None:
    async def revoked() -> bool:
        return {status for *_, status in follower.devices().values()} == {"revoked"}

    await until(revoked, "every device is revoked")


# --- how far a copy has come -----------------------------------------------------------------------------------------


async def test_a_copy_serves_a_version_from_the_refresh_that_saw_it(
    dsn: str, follower: Following, connection: asyncpg.Connection
) -> None:
    async with connected(dsn) as writer:
        transaction = writer.transaction()
        await transaction.start()
        open_version = int(await writer.fetchval("select pg_current_xact_id()::text"))
        printed = await registry_edits.set_device_status(Target(dsn), "ann", "d1", "revoked", "")
        assert printed is not None
        version = int(printed.partition("@")[0])
        assert version is not None
        assert not follower.position.serves(version)
        await refresh(follower)
        assert follower.position.serves(version)
        assert not follower.position.serves(open_version)
        await transaction.commit()
    assert not follower.position.serves(open_version)
    await refresh(follower)
    assert follower.position.serves(open_version)


async def test_pruning_spares_readers_of_the_retention_time(
    dsn: str, follower: Following, connection: asyncpg.Connection
) -> None:
    await connection.execute("update device set status = 'revoked'")
    for _ in range(3):
        await follower.feed.prune()  # keeps one hour
    assert await connection.fetchval("select count(*) from change") > 0
    assert await refresh(follower) == 3
    assert await follower.agrees()


async def test_a_reader_slower_than_pruning_loads_everything_anew(
    dsn: str, follower: Following, connection: asyncpg.Connection
) -> None:
    await connection.execute("update device set status = 'revoked'")
    await connection.fetchval("select change_prune('0 s')")
    await connection.execute("select pg_current_xact_id()")
    assert await connection.fetchval("select change_prune('0 s')") >= 0
    assert await connection.fetchval("select count(*) from change") == 0
    assert (await follower.copy.refresh()).full
    assert await follower.agrees()
    await connection.execute("update device set status = 'active'")
    assert await refresh(follower) == 3


async def test_a_reader_that_keeps_up_is_never_thrown_back_by_pruning(
    follower: Following, connection: asyncpg.Connection
) -> None:
    for n in range(10):
        await connection.execute("update device set attributes = jsonb_build_object('n', $1::text)", str(n))
        assert await refresh(follower) == 3
        await connection.fetchval("select change_prune('0 s')")
    assert await refresh(follower) == 0
    assert await follower.agrees()


async def test_pruning_never_passes_a_transaction_that_is_still_open(
    dsn: str, follower: Following, connection: asyncpg.Connection
) -> None:
    async with connected(dsn) as writer:
        transaction = writer.transaction()
        await transaction.start()
        await writer.execute("update device set status = 'revoked' where device_id = 'd1'")
        await connection.execute("update device set status = 'revoked' where device_id = 'd2'")
        for _ in range(3):
            await connection.fetchval("select change_prune('0 s')")
        await transaction.commit()
    assert await refresh(follower) == 2
    assert await follower.agrees()


async def test_two_that_prune_at_once_do_not_wait_for_each_other(dsn: str, connection: asyncpg.Connection) -> None:
    async with connected(dsn, command_timeout=10) as other, connection.transaction():
        await connection.fetchval("select change_prune('0 s')")
        assert await other.fetchval("select change_prune('0 s')") == 0


async def test_rows_and_floors_from_a_cluster_that_was_ahead_do_not_last(
    follower: Following, connection: asyncpg.Connection
) -> None:
    await connection.execute("insert into change (txid, entity, key) values ('4000000000', 'device', 'd1')")
    await connection.execute("insert into change_horizon (horizon) values ('4000000000')")
    await connection.execute("update change_floor set floor = '4000000000'")
    assert (await follower.copy.refresh()).full
    assert (await follower.copy.refresh()).full  # correct but expensive, until the next pruning
    await follower.feed.prune()
    assert await refresh(follower) == 0
    await connection.execute("update device set status = 'revoked'")
    assert await refresh(follower) == 3


async def test_a_mark_ahead_of_the_server_leads_to_a_whole_load(
    follower: Following, connection: asyncpg.Connection
) -> None:
    position = follower.position
    follower.store.note(
        position=type(position)(
            position.epoch, position.incarnation, f"{position.xmin + 10**6}:{position.xmax + 10**6}:"
        )
    )
    await connection.execute("update device set status = 'revoked'")
    assert (await follower.copy.refresh()).full
    assert await follower.agrees()


# --- the comparison --------------------------------------------------------------------------------------------------

UNSEEN = {
    "device changed": ("device", "update device set status = 'revoked' where device_id = 'd1'", 1),
    "device added": ("device", "insert into device (device_id, common_name, type) values ('n1', 'n1', 'agv')", 1),
    "device deleted": ("device", "delete from device where device_id = 'd1'", 1),
    "account changed": ("account", "update account set tags = '{monitoring}'", 1),
    "type changed": ("device_type", "update device_type set vhosts = '{}'", 1),
    "rule changed": ("topic_rule", "update topic_rule set effect = 'deny'", 2),
}


@pytest.mark.parametrize("what", UNSEEN)
async def test_the_comparison_finds_and_heals_what_no_trigger_saw(
    follower: Following, connection: asyncpg.Connection, what: str
) -> None:
    table, statement, number = UNSEEN[what]
    assert await follower.copy.compare() == 0
    await connection.execute(f"alter table {table} disable trigger user")
    await connection.execute(statement)
    for name in ("change_i", "change_u", "change_d", "change_t"):
        await connection.execute(f"alter table {table} enable always trigger {name}")
    assert await refresh(follower) == 0
    assert not await follower.agrees()
    assert await follower.copy.compare() == number
    assert await follower.agrees()
    assert await follower.copy.compare() == 0
    assert follower.observed.comparisons == [0, number, 0]


async def test_the_comparison_does_not_count_changes_that_are_only_new(
    follower: Following, connection: asyncpg.Connection
) -> None:
    await connection.execute("update device set status = 'revoked'")
    assert await follower.copy.compare() == 0
    assert await follower.agrees()


async def test_a_copy_is_compared_in_the_background(dsn: str, connection: asyncpg.Connection) -> None:
    await fleet(connection)
    follower = Following(dsn, times=SyncTimes(poll_s=0.05, compare_s=0.1))
    async with following(follower.copy):
        await until_loaded(follower)
        async with connection.transaction():
            await connection.execute("alter table device disable trigger change_u")
            await connection.execute("update device set status = 'revoked'")
            await connection.execute("alter table device enable always trigger change_u")
        await until_revoked(follower)
    assert 3 in follower.observed.comparisons
    await follower.feed.close()


async def test_without_a_registry_the_fault_says_what_to_run(postgres: Server) -> None:
    feed = ChangeFeed(Target(postgres.dsn("postgres")))
    with pytest.raises(
        Unavailable, match="the database's schema does not fit this version of authbackend .*; run: authbackend migrate"
    ):
        await loaded(feed)
