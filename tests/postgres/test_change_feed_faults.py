"""The copy in memory stays correct through crashes, restores, fail-overs and changes of the schema."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest

from authbackend.errors import Unavailable
from authbackend.policy import decide
from authbackend.policy.requests import LoginRequest
from authbackend.postgres import migrate as migrations
from authbackend.postgres.change_feed import ChangeFeed
from authbackend.postgres.connection import Target
from authbackend.postgres.statements import SQL
from authbackend.registry.follower import SyncTimes
from authbackend.registry.position import FeedPosition
from tests.support.postgres import Server, connected, run, until
from tests.support.registry import Following, copied, fleet, following, loaded

SOON = SyncTimes(poll_s=0.02)


@pytest.fixture
async def follower(dsn: str, connection: asyncpg.Connection) -> AsyncIterator[Following]:
    """A loaded copy of a small fleet, refreshed by hand."""
    await fleet(connection)
    async with copied(dsn) as loaded:
        yield loaded


@contextlib.asynccontextmanager
async def in_background(dsn: str) -> AsyncIterator[Following]:
    """A copy that follows by itself, with short intervals."""
    follower = Following(dsn, times=SOON)
    async with following(follower.copy):
        await until(lambda: _is(follower.loaded), "the copy is loaded")
        yield follower
    await follower.feed.close()


async def _is(value: bool) -> bool:
    return value


async def execute(dsn: str, *statements: str) -> None:
    async with connected(dsn) as connection:
        for statement in statements:
            await connection.execute(statement)


async def refreshed_fully(follower: Following) -> None:
    """Refresh after the connection or the server broke, which must end in a full load."""
    await follower.feed.close()
    assert (await follower.copy.refresh()).full
    assert await follower.agrees()
    assert not (await follower.copy.refresh()).full


async def catch_up(dsn: str, position: FeedPosition) -> None:
    """Advance the transaction ids past a position of an earlier incarnation, so that its numbers look plausible."""

    async with connected(dsn) as connection:

        async def past() -> bool:
            await connection.execute("select pg_current_xact_id()")
            return (
                int(await connection.fetchval("select pg_snapshot_xmin(pg_current_snapshot())::text")) > position.xmax
            )

        await until(past, "the counter has caught up")


# --- crashes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def lazy_wal(postgres: Server) -> Iterator[None]:
    """Delay writing asynchronous commits to the WAL for seconds, so that a crash is sure to lose them."""
    for setting in ("wal_writer_delay = '10s'", "wal_writer_flush_after = '1GB'"):
        postgres.psql("postgres", f"alter system set {setting}")
    postgres.psql("postgres", "select pg_reload_conf()")
    yield
    postgres.psql("postgres", "alter system reset all")
    postgres.psql("postgres", "select pg_reload_conf()")


async def test_transaction_ids_given_out_again_after_a_crash_hide_no_change(
    postgres: Server, dsn: str, follower: Following, lazy_wal: None
) -> None:
    for _ in range(5):  # retried, because a checkpoint or another writer may have flushed the WAL
        async with connected(dsn) as victim:
            await victim.execute("set synchronous_commit = off")
            for _ in range(3):
                await victim.execute("update device set status = 'suspended' where device_id = 'd1'")
            await follower.copy.refresh()
            seen = follower.position
            assert follower.devices()["d1"][2] == "suspended"
            await postgres.kill_backend(victim.get_server_pid())
        async with connected(dsn) as writer, writer.transaction():
            await writer.execute("update device set status = 'revoked' where device_id = 'd2'")
            version = int(await writer.fetchval("select pg_current_xact_id()::text"))
        if version < seen.xmax:
            break
        await refreshed_fully(follower)
        await execute(dsn, "update device set status = 'active'")
        await follower.copy.refresh()
    assert seen.serves(version), "the crash gave no transaction id out again"
    await catch_up(dsn, seen)
    await refreshed_fully(follower)
    assert follower.devices()["d2"][2] == "revoked"
    assert follower.position.incarnation != seen.incarnation
    assert follower.position.epoch == seen.epoch  # only the incarnation shows it


@pytest.mark.parametrize("mode", ["immediate", "fast"])
async def test_a_server_that_was_stopped_is_followed_again(postgres: Server, dsn: str, mode: str) -> None:
    await execute(dsn, "select 1")
    async with connected(dsn) as connection:
        await fleet(connection)
    async with in_background(dsn) as follower:
        before = follower.position
        postgres.stop(mode)
        try:
            await until(lambda: _is(follower.copy.fault is not None), "the fault is told")
            assert follower.copy.fault is not None
            assert "PostgreSQL" in follower.copy.fault
            assert str(postgres.folder) not in follower.copy.fault
            assert len(follower.devices()) == 3
        finally:
            postgres.start()
        await execute(dsn, "update device set status = 'revoked'")
        await until(lambda: _is({s for *_, s in follower.devices().values()} == {"revoked"}), "the change is followed")
        await until(lambda: _is(follower.copy.fault is None), "the fault is over")
        assert follower.position.epoch != before.epoch
        assert (follower.position.incarnation != before.incarnation) == (mode == "immediate")
        assert [refreshed.full for refreshed in follower.observed.refreshes].count(True) == 2


async def test_replicas_agree_on_the_incarnation_that_a_crash_made_necessary(
    postgres: Server, dsn: str, follower: Following
) -> None:
    postgres.crash()
    found = await asyncio.gather(*(loaded(ChangeFeed(Target(dsn))) for _ in range(4)))
    assert len({(feed_read.position.epoch, feed_read.position.incarnation) for _, feed_read in found}) == 1


@pytest.mark.parametrize("hosts", [1, 2], ids=["a host", "two hosts"])
async def test_a_host_that_swallows_packets_costs_no_more_than_the_connect_timeout(hosts: int) -> None:
    """While the listen queue is full, the kernel drops connection attempts, and a client would retry for minutes."""
    async with asyncio.timeout(30):
        with contextlib.ExitStack() as stack:
            places = []
            for _ in range(hosts):
                silent = stack.enter_context(socket.socket())
                silent.bind(("127.0.0.1", 0))
                silent.listen(0)
                for _ in range(4):
                    waiting = stack.enter_context(socket.socket())
                    waiting.setblocking(False)
                    waiting.connect_ex(silent.getsockname())
                places.append(f"127.0.0.1:{silent.getsockname()[1]}")
            feed = ChangeFeed(Target(f"postgresql://nobody@{','.join(places)}/registry", connect_timeout_s=0.2))
            with pytest.raises(Unavailable, match="cannot be reached: no connection within 0.2 s"):
                await loaded(feed)


# --- schema changes ------------------------------------------------------------------------------------------------

REWRITE = "alter table device add column made_by uuid not null default gen_random_uuid()"


async def waits_for_lock(admin: asyncpg.Connection) -> None:
    sql = "select count(*) from pg_stat_activity where application_name = 'authbackend' and wait_event_type = 'Lock'"

    async def waits() -> bool:
        return bool(await admin.fetchval(sql))

    await until(waits, "the reader waits for the lock")


async def test_a_load_during_a_rewrite_of_a_table_is_not_empty(dsn: str, connection: asyncpg.Connection) -> None:
    await fleet(connection)
    async with connected(dsn) as altering:
        transaction = altering.transaction()
        await transaction.start()
        await altering.execute(REWRITE)
        loading = asyncio.create_task(loaded(ChangeFeed(Target(dsn))))
        await waits_for_lock(connection)
        await transaction.commit()
        store, _ = await loading
    assert store.sizes() == {"device": 3, "device_type": 1, "account": 1}


async def test_a_refresh_during_a_rewrite_of_a_table_misses_nothing(
    dsn: str, follower: Following, connection: asyncpg.Connection
) -> None:
    async with connected(dsn) as altering:
        transaction = altering.transaction()
        await transaction.start()
        await altering.execute("update device set status = 'revoked' where device_id = 'd1'")
        await altering.execute(REWRITE)
        refreshing = asyncio.create_task(follower.copy.refresh())
        await waits_for_lock(connection)
        await transaction.commit()
        await refreshing
    assert await follower.agrees()
    assert follower.devices()["d1"][2] == "revoked"


async def test_a_table_locked_for_long_is_a_fault_that_keeps_the_copy(
    dsn: str, follower: Following, connection: asyncpg.Connection
) -> None:
    async with connected(dsn) as altering:
        transaction = altering.transaction()
        await transaction.start()
        await altering.execute("lock table device in access exclusive mode")
        pid = altering.get_server_pid()
        with pytest.raises(
            Unavailable,
            match=rf"^the registry cannot be read: .*pid {pid} .* has an ACCESS EXCLUSIVE lock on table device\. ",
        ):
            await follower.copy.refresh()
        assert len(follower.devices()) == 3
        await transaction.rollback()
    await follower.copy.refresh()
    assert await follower.agrees()


@pytest.mark.parametrize("role", ["postgres", "authbackend_service"])
async def test_a_dump_with_a_change_of_the_schema_behind_it_is_told_with_who_holds(
    postgres: Server, database: str, dsn: str, connection: asyncpg.Connection, role: str
) -> None:
    await fleet(connection)
    postgres.psql(database, (SQL / "roles.sql").read_text(encoding="utf-8") + "alter role authbackend_service login;")
    dumping = {"server_settings": {"application_name": "pg_dump"}}
    altering = {"server_settings": {"application_name": "migration"}}
    async with (
        in_background(postgres.dsn(database, role)) as follower,
        connected(dsn, **dumping) as dump,
        connected(dsn, **altering) as alter,
    ):
        transaction = dump.transaction()
        await transaction.start()
        await dump.execute("lock table device in access share mode")
        change = asyncio.create_task(alter.execute("alter table device add column note text"))
        await until(lambda: _is(follower.copy.fault is not None), "the fault is told")
        told = follower.copy.fault
        assert told is not None
        wants, holds = f"pid {alter.get_server_pid()} ", f"pid {dump.get_server_pid()} "
        assert re.search(
            wants
            + r'\(application "migration"\) has been waiting since 20[0-9-]+ [0-9:+]+ for an ACCESS EXCLUSIVE lock on table device,',
            told,
        )
        assert re.search("It waits for " + holds + r'\(application "pg_dump", role postgres; ', told)
        assert ("its transaction began at 20" in told) == (role == "postgres")
        assert f"select pg_terminate_backend({alter.get_server_pid()})" in told
        assert len(follower.devices()) == 3
        await transaction.rollback()
        await change
        await connection.execute("update device set status = 'revoked'")
        await until(lambda: _is({s for *_, s in follower.devices().values()} == {"revoked"}), "the change is followed")
        await until(lambda: _is(follower.copy.fault is None), "the fault is over")


async def test_a_changed_column_type_is_followed(dsn: str, connection: asyncpg.Connection) -> None:
    await fleet(connection)
    async with in_background(dsn) as follower:

        async def vhosts() -> tuple[str, ...]:
            found = follower.device_type("agv")
            return found.vhosts if found is not None else ()

        async def first() -> bool:
            return await vhosts() == ("/", "first")

        async def second() -> bool:
            return await vhosts() == ("/", "second") and follower.copy.fault is None

        await connection.execute("update device_type set vhosts = '{/,first}'")
        await until(first, "the first change is followed")
        await connection.execute("drop trigger not_null on device_type")  # it depends on the column
        await connection.execute("alter table device_type alter column vhosts type varchar(255)[]")
        await connection.execute("update device_type set vhosts = '{/,second}'")
        await until(second, "the second change is followed")
        assert await follower.agrees()


# --- restores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("single", [True, False], ids=["single transaction", "table by table"])
async def test_a_restore_into_the_same_database_never_empties_the_copy(
    postgres: Server, database: str, dsn: str, connection: asyncpg.Connection, single: bool
) -> None:
    await fleet(connection)
    dump = postgres.folder / f"{database}.dump"
    async with in_background(dsn) as follower:
        before = follower.position
        postgres.run("pg_dump", "-Fc", "-f", dump, database)
        await connection.execute("update device set status = 'suspended'")
        await until(lambda: _is({s for *_, s in follower.devices().values()} == {"suspended"}), "the last change")
        sizes = set()
        restoring = asyncio.create_task(
            asyncio.to_thread(
                postgres.run,
                *("pg_restore", "--clean", "--if-exists", "--exit-on-error"),
                *(["--single-transaction"] if single else []),
                *("-d", database, dump),
            )
        )
        while not restoring.done():
            sizes.add(str(follower.store.sizes()))
            await asyncio.sleep(0.001)
        await restoring
        await until(lambda: _is({s for *_, s in follower.devices().values()} == {"active"}), "the restore is followed")
        await until(lambda: _is(follower.copy.fault is None), "the fault is over")
        assert sizes == {str({"device": 3, "device_type": 1, "account": 1})}
        assert follower.position.epoch != before.epoch
        assert follower.position.incarnation == before.incarnation  # the dump contains it; only the tables are new
        await execute(dsn, "update device set status = 'revoked'")
        await until(lambda: _is({s for *_, s in follower.devices().values()} == {"revoked"}), "the next change")
        assert await follower.agrees()


async def test_a_restore_of_data_alone_is_told_repaired_and_healed(
    postgres: Server, database: str, dsn: str, follower: Following, connection: asyncpg.Connection
) -> None:
    dump = postgres.folder / f"{database}.dump"
    postgres.run("pg_dump", "-Fc", "-f", dump, database)
    await connection.execute("delete from device")
    await follower.copy.refresh()
    assert follower.devices() == {}
    postgres.run("pg_restore", "--data-only", "--disable-triggers", "-t", "device", "-d", database, dump)
    with pytest.raises(Unavailable, match=r"20 of 24 change triggers .* Run: authbackend migrate --repair-triggers"):
        await follower.copy.refresh()
    assert follower.devices() == {}
    assert await migrations.repair_triggers(Target(dsn)) > 0
    await follower.copy.refresh()
    assert follower.devices() == {}  # there was no change row for it
    assert await follower.copy.compare() == 3
    assert await follower.agrees()
    assert len(follower.devices()) == 3
    await connection.execute("update device set status = 'revoked'")
    assert (await follower.copy.refresh()).changed == 3


@pytest.mark.parametrize("trigger", ["change_i", "change_u", "change_d", "change_t"])
@pytest.mark.parametrize("how", ["disable trigger {}", "enable trigger {}", "enable replica trigger {}"])
async def test_a_missing_trigger_keeps_the_copy_and_the_fault_is_told(
    follower: Following, connection: asyncpg.Connection, trigger: str, how: str
) -> None:
    await connection.execute(f"alter table account {how.format(trigger)}")
    with pytest.raises(Unavailable, match="23 of 24 change triggers exist and are enabled"):
        await follower.copy.refresh()
    with pytest.raises(Unavailable, match="23 of 24 change triggers exist and are enabled"):
        await follower.copy.compare()
    assert len(follower.devices()) == 3
    assert await migrations.repair_triggers(Target(follower.dsn)) == 1
    assert not (await follower.copy.refresh()).full


async def test_another_database_of_the_same_name_is_loaded_anew(
    postgres: Server, database: str, migrated_template: str, follower: Following
) -> None:
    await execute(
        postgres.dsn("postgres"),
        f"drop database {database} with (force)",
        f"create database {database} template {migrated_template}",
    )
    await refreshed_fully(follower)
    assert follower.devices() == {}


# --- other servers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def primary(postgres: Server) -> Iterator[Server]:
    """A second server with a small fleet in the database ``registry``."""
    server = Server(postgres.version)
    try:
        server.create()
        server.start()
        server.psql("postgres", "create database registry")

        async def fill() -> None:
            await migrations.migrate(Target(server.dsn("registry")))
            async with connected(server.dsn("registry")) as connection:
                await fleet(connection)

        run(fill())
        yield server
    finally:
        server.remove()


async def test_a_standby_is_refused_until_it_is_promoted(primary: Server) -> None:
    standby = Server(primary.version)
    try:
        primary.run("pg_basebackup", "-D", standby.data, "-R", "-X", "stream", "-c", "fast")
        standby.start()
        async with copied(primary.dsn("registry")) as original:
            feed = ChangeFeed(Target(standby.dsn("registry")))
            with pytest.raises(Unavailable, match=r"the server is a standby.* Connect to the primary"):
                await loaded(feed)
            standby.run("pg_ctl", "promote", "-w", "-D", standby.data)
            store, promoted = await loaded(feed)
            assert store.sizes() == original.store.sizes()
            timelines = [position.epoch.split("/")[2] for position in (original.position, promoted.position)]
            assert timelines == ["00000001", "00000002"]
            assert promoted.position.incarnation != original.position.incarnation
    finally:
        standby.remove()


async def test_an_older_copy_of_the_files_is_loaded_anew(primary: Server) -> None:
    dsn = primary.dsn("registry")
    async with copied(dsn) as earlier:
        incarnation = earlier.position.incarnation
    primary.stop()
    older = primary.folder / "older"
    subprocess.run(["cp", "-a", primary.data, older], check=True)
    primary.start()
    async with copied(dsn) as follower:
        await execute(dsn, *["update device set status = 'suspended'"] * 5)
        await follower.copy.refresh()
        ahead = follower.position
        primary.stop()
        shutil.rmtree(primary.data)
        older.rename(primary.data)
        primary.start()
        async with connected(dsn) as connection, connection.transaction():
            await connection.execute("update device set status = 'revoked' where device_id = 'd1'")
            version = int(await connection.fetchval("select pg_current_xact_id()::text"))
        assert ahead.serves(version)
        assert ahead.incarnation == incarnation
        await catch_up(dsn, ahead)
        await refreshed_fully(follower)
        assert follower.position.incarnation == incarnation  # only the start time of the server shows it
        assert {key: status for key, (*_, status) in follower.devices().items()} == {
            "d1": "revoked",
            "d2": "active",
            "d3": "active",
        }


# --- how soon --------------------------------------------------------------------------------------------------------


async def test_what_psql_commits_is_what_is_decided_by(
    postgres: Server, database: str, dsn: str, connection: asyncpg.Connection
) -> None:
    await fleet(connection)
    follower = Following(dsn)  # with the intervals of production

    def allowed() -> bool:
        with follower.store.reader() as registry:
            decision: Any = decide.login(registry, LoginRequest("d1", client_id="d1"), time.time())
        return bool(decision.allowed)

    command = [str(postgres.bin / "psql"), "-XAtq", "-h", str(postgres.folder), "-U", "postgres", "-d", database]
    psql = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert psql.stdin is not None
    assert psql.stdout is not None
    took = []
    async with following(follower.copy):
        await until(lambda: _is(follower.loaded), "the copy is loaded")
        for status in ["revoked", "active"] * 10:
            psql.stdin.write(f"update device set status = '{status}' where device_id = 'd1';\n\\echo done\n".encode())
            await psql.stdout.readline()
            committed = time.monotonic()
            async with asyncio.timeout(10):
                while allowed() != (status == "active"):
                    await asyncio.sleep(0.0005)
            took.append((time.monotonic() - committed) * 1000)
    psql.stdin.close()
    await psql.wait()
    await follower.feed.close()
    print(f"psql committed -> decided by: median {statistics.median(took):.1f} ms, longest {max(took):.1f} ms")
