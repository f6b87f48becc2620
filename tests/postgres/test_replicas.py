"""Replicas announce what they serve; `wait` confirms a version only when no replica can answer by an older one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from structlog.testing import capture_logs

from authbackend import clocks
from authbackend.errors import InvalidInput, NotFound, Unconfirmed
from authbackend.postgres import registry_edits, replicas
from authbackend.postgres.change_feed import ChangeFeed
from authbackend.postgres.connection import Target
from authbackend.postgres.replicas import Identity, PostgresReplicaTable
from authbackend.registry.identity import Boot
from authbackend.registry.snapshot import SnapshotFolder
from tests.postgres.test_roles import ADMIN, READER, SERVICE, give_roles
from tests.support.postgres import Server, connected, until
from tests.support.registry import Following, fleet


class Replica:
    """A replica that refreshes and announces only when told to."""

    def __init__(
        self, dsn: str, name: str, longest_staleness_s: float = 900.0, snapshot_folder: SnapshotFolder | None = None
    ) -> None:
        boot = snapshot_folder.begin_boot() if snapshot_folder else Boot(uuid.uuid4())
        self.identity = Identity(boot, name, "0", 2, longest_staleness_s)
        self.replica_table = PostgresReplicaTable(Target(dsn), self.identity)
        self.follower = Following(dsn, ChangeFeed(Target(dsn), identity=self.identity))

    async def feed_read(self) -> None:
        await self.follower.copy.refresh()

    async def announce(self) -> None:
        newest = self.follower.observed.looks[-1]
        await self.replica_table.announce(newest.position, newest.confirmed_at)

    async def close(self) -> None:
        await self.follower.feed.close()
        await self.replica_table.close()


@contextlib.asynccontextmanager
async def replica(dsn: str, name: str, **kwargs: Any) -> AsyncIterator[Replica]:
    made = Replica(dsn, name, **kwargs)
    try:
        yield made
    finally:
        await made.close()


async def revoke(dsn: str, device_id: str = "d1") -> str:
    version = await registry_edits.set_device_status(Target(dsn), "ann", device_id, "revoked", "")
    assert version is not None
    return version


async def unconfirmed(dsn: str, version: str) -> str:
    with pytest.raises(Unconfirmed) as refused:
        await replicas.wait(Target(dsn), version, 0)
    return str(refused.value)


async def state_of(dsn: str, name: str) -> str:
    return str(next(row["state"] for row in await replicas.list_replicas(Target(dsn)) if row["name"] == name))


async def test_confirmed_only_when_every_replica_has_announced_it(dsn: str, connection: asyncpg.Connection) -> None:
    await fleet(connection)
    async with replica(dsn, "north") as north, replica(dsn, "south") as south:
        for one in (north, south):
            await one.feed_read()
            await one.announce()
        version = await revoke(dsn)
        assert "north" in await unconfirmed(dsn, version)
        await north.feed_read()
        await north.announce()
        message = await unconfirmed(dsn, version)
        assert "south" in message
        assert "north" not in message
        waiting = asyncio.create_task(replicas.wait(Target(dsn), version, 30))
        await south.feed_read()
        assert not waiting.done()  # it serves the version but has not announced it
        await south.announce()
        assert [found["name"] for found in await waiting] == ["north", "south"]


async def test_a_replica_is_waited_for_from_before_its_first_look(dsn: str, connection: asyncpg.Connection) -> None:
    """Otherwise a change committed between its first read and its first announcement would be confirmed without it."""
    await fleet(connection)
    async with replica(dsn, "new") as new, connected(dsn) as locking:
        transaction = locking.transaction()
        await transaction.start()
        await locking.execute("lock table device in access exclusive mode")
        looking = asyncio.create_task(new.feed_read())

        async def introduced() -> bool:
            return bool(await connection.fetchval("select count(*) from replica"))

        await until(introduced, "the replica is known")
        assert await state_of(dsn, "new") == "starting"
        await transaction.rollback()
        await looking
        assert "new" in await unconfirmed(dsn, await revoke(dsn))


async def test_one_that_signed_off_is_not_waited_for_unless_it_can_come_back_without_the_database(
    dsn: str, connection: asyncpg.Connection
) -> None:
    await fleet(connection)
    async with replica(dsn, "north") as north:
        await north.feed_read()
        await north.announce()
        await north.replica_table.sign_off(comes_back=True)
        assert await state_of(dsn, "north") == "stopped"
        version = await revoke(dsn)
        assert "north" in await unconfirmed(dsn, version)
        await north.replica_table.sign_off(comes_back=False)
        assert await replicas.wait(Target(dsn), version, 0) == []


async def test_a_silent_one_is_waited_for_until_its_copy_is_too_old_to_decide_by(
    dsn: str, connection: asyncpg.Connection
) -> None:
    await fleet(connection)
    async with replica(dsn, "north", longest_staleness_s=60) as north:
        await north.feed_read()
        await north.announce()
        version = await revoke(dsn)

        async def aged(seconds: int) -> None:
            await connection.execute(
                "update replica set introduced_at = clock_timestamp() - make_interval(secs => $1), confirmed_at = clock_timestamp() - make_interval(secs => $1)",
                float(seconds),
            )

        await aged(59)
        assert await state_of(dsn, "north") == "silent"
        assert "north" in await unconfirmed(dsn, version)
        await aged(70)
        assert await state_of(dsn, "north") == "gone"
        assert await replicas.wait(Target(dsn), version, 0) == []
        await aged(60 + 86_400 + 60)
        await north.replica_table.peers()
        assert await connection.fetchval("select count(*) from replica") == 0


async def test_one_that_is_cut_off_is_not_taken_for_gone_because_the_clock_of_the_database_was_set_forward(
    dsn: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test leaves the clock alone and moves all recorded times back instead."""
    await fleet(connection)
    uptime = clocks.uptime
    async with replica(dsn, "north", longest_staleness_s=900) as north, replica(dsn, "south") as south:
        await north.feed_read()
        await north.announce()
        await south.feed_read()
        await south.announce()
        await south.replica_table.peers()
        for device_id, by_s in (("d1", 3600.0), ("d2", 30 * 86400.0)):
            version = await revoke(dsn, device_id)
            await connection.execute(
                "update replica set introduced_at = introduced_at - make_interval(secs => $1), confirmed_at = confirmed_at - make_interval(secs => $1)",
                by_s,
            )
            monkeypatch.setattr(clocks, "uptime", lambda by_s=by_s: uptime() - by_s)
            await south.feed_read()
            await south.announce()
            with capture_logs() as logged:
                await south.replica_table.peers()
            monkeypatch.setattr(clocks, "uptime", uptime)
            await south.replica_table.peers()
            assert [round(line["by_s"], -1) for line in logged if line["event"] == "database.clock_stepped"] == [by_s]
            assert "north" in await unconfirmed(dsn, version)
        left = await connection.fetchval(
            "select counts_until - clock_timestamp() from replica_state where name = 'north'"
        )
        assert 0 < left.total_seconds() <= 905, "no longer than before either"


async def test_a_version_of_another_life_is_never_confirmed(
    postgres: Server, dsn: str, connection: asyncpg.Connection
) -> None:
    await fleet(connection)
    version = await revoke(dsn)
    transaction, _, life = version.partition("@")
    other = f"{transaction}@{life[::-1] if life != life[::-1] else '0' * 8}"
    assert "another incarnation" in await unconfirmed(dsn, other)
    async with replica(dsn, "north") as north:
        await north.feed_read()
        await north.announce()
        assert len(await replicas.wait(Target(dsn), version, 0)) == 1
        postgres.crash()
        assert "another incarnation" in await unconfirmed(dsn, version)
        async with connected(dsn) as again:
            later = str(await again.fetchval("select registry_version()"))
        assert "north" in await unconfirmed(dsn, later)  # its position is of the previous incarnation
        await north.close()
        await north.feed_read()
        await north.announce()
        assert len(await replicas.wait(Target(dsn), later, 0)) == 1


async def test_an_open_transaction_is_waited_for_and_a_rolled_back_one_refused(
    dsn: str, connection: asyncpg.Connection
) -> None:
    await connection.fetchval("select incarnation_renew()")
    async with connected(dsn) as writer:
        transaction = writer.transaction()
        await transaction.start()
        version = str(await writer.fetchval("select registry_version()"))
        assert "was not committed" in await unconfirmed(dsn, version)
        waiting = asyncio.create_task(replicas.wait(Target(dsn), version, 30))
        await transaction.commit()
        assert await waiting == []
        transaction = writer.transaction()
        await transaction.start()
        version = str(await writer.fetchval("select registry_version()"))
        await transaction.rollback()
    with pytest.raises(InvalidInput, match="was rolled back"):
        await replicas.wait(Target(dsn), version, 0)


@pytest.mark.parametrize("version", ["", "0", "-1", "x", "1@", "1@zz", "1@0a1b2c3d ", "9" * 19, "1; drop table device"])
async def test_what_is_no_version_is_refused(dsn: str, version: str) -> None:
    with pytest.raises(InvalidInput):
        await replicas.wait(Target(dsn), version, 0)


async def test_a_transaction_that_has_not_begun_is_refused(dsn: str) -> None:
    with pytest.raises(InvalidInput, match="no transaction 99999999 has begun yet"):
        await replicas.wait(Target(dsn), "99999999", 0)


async def test_a_forgotten_replica_that_still_runs_comes_back(dsn: str, connection: asyncpg.Connection) -> None:
    await fleet(connection)
    async with replica(dsn, "north") as north:
        await north.feed_read()
        await north.announce()
        assert await replicas.forget_replica(Target(dsn), "ann", "north") == 1
        assert await replicas.list_replicas(Target(dsn)) == []
        await north.announce()
        assert await state_of(dsn, "north") == "live"
    with pytest.raises(NotFound):
        await replicas.forget_replica(Target(dsn), "ann", "nobody")


@contextlib.contextmanager
def folder(path: Path) -> Iterator[SnapshotFolder]:
    """A data folder that is in use for the duration of the block, as by a service with a live process."""
    snapshot_folder = SnapshotFolder(path, "registry", 900.0)
    try:
        yield snapshot_folder
    finally:
        snapshot_folder.close()


async def test_two_that_run_from_copies_of_one_folder_are_two_and_both_are_waited_for(
    dsn: str, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    await fleet(connection)
    with folder(tmp_path / "a") as snapshot_folder:
        async with replica(dsn, "north", snapshot_folder=snapshot_folder) as first:
            await first.feed_read()
            await first.announce()
            shutil.copytree(
                tmp_path / "a", tmp_path / "b"
            )  # the lock of the copy is free although the first replica runs
            with folder(tmp_path / "b") as copied:
                async with replica(dsn, "north", snapshot_folder=copied) as second:
                    await second.feed_read()
                    await second.announce()
                    version = await revoke(dsn)
                    await second.feed_read()
                    await second.announce()
                    assert str(first.identity.boot.id) in await unconfirmed(dsn, version)
                    rows = await replicas.list_replicas(Target(dsn))
                    assert [row["twins"] for row in rows] == [1, 1]
                    assert len({row["id"] for row in rows}) == 2
                    assert len({row["folder"] for row in rows}) == 1
                    peers = await second.replica_table.peers()
                    assert (peers.twins, peers.states["live"]) == (2, 2)
                    await first.feed_read()
                    await first.announce()
                    assert len(await replicas.wait(Target(dsn), version, 0)) == 2


async def test_a_killed_one_that_is_started_again_takes_its_own_place_at_once(
    dsn: str, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    await fleet(connection)
    with folder(tmp_path / "a") as snapshot_folder:
        async with replica(dsn, "north", snapshot_folder=snapshot_folder) as killed:
            await killed.feed_read()
            await killed.announce()
    with folder(tmp_path / "a") as snapshot_folder:
        snapshot_folder.begin_boot()  # killed again before it reached the database
    with folder(tmp_path / "a") as snapshot_folder:
        async with replica(dsn, "north", snapshot_folder=snapshot_folder) as again:
            version = await revoke(dsn)
            assert str(killed.identity.boot.id) in await unconfirmed(dsn, version)
            await again.feed_read()
            await again.announce()
            (row,) = await replicas.wait(Target(dsn), version, 0)
            assert row["id"] == str(again.identity.boot.id)
            assert (await again.replica_table.peers()).twins == 0


async def test_one_that_starts_again_while_nothing_can_be_written_is_waited_for_in_its_former_place(
    dsn: str, database: str, connection: asyncpg.Connection, postgres: Server, tmp_path: Path
) -> None:
    await fleet(connection)
    with folder(tmp_path / "a") as snapshot_folder:
        async with replica(dsn, "north", snapshot_folder=snapshot_folder) as killed:
            await killed.feed_read()
            await killed.announce()
    await connection.execute("update replica set introduced_at = '2020-01-01', confirmed_at = '2020-01-01'")
    assert [row["may_answer"] for row in await replicas.list_replicas(Target(dsn))] == [False]
    postgres.psql("postgres", f"alter database {database} set default_transaction_read_only = on")
    with folder(tmp_path / "a") as snapshot_folder:
        async with replica(dsn, "north", snapshot_folder=snapshot_folder) as again:
            await again.feed_read()
            assert await again.follower.agrees()
            (row,) = await replicas.list_replicas(Target(dsn))
            assert (row["id"], row["may_answer"]) == (str(killed.identity.boot.id), True)
            postgres.psql("postgres", f"alter database {database} reset default_transaction_read_only")
            await again.follower.feed.close()  # the new connection can write
            await again.feed_read()
            await again.announce()
            (row,) = await replicas.list_replicas(Target(dsn))
            assert row["id"] == str(again.identity.boot.id)


@pytest.mark.parametrize("signed_off", [True, False])
async def test_on_a_kernel_that_was_started_anew_only_what_signed_off_is_known_to_have_ended(
    dsn: str, connection: asyncpg.Connection, tmp_path: Path, signed_off: bool
) -> None:
    await fleet(connection)
    with folder(tmp_path / "a") as snapshot_folder:
        async with replica(dsn, "north", snapshot_folder=snapshot_folder) as before:
            await before.feed_read()
            await before.announce()
            if signed_off:
                await before.replica_table.sign_off(comes_back=True)
    kept = json.loads((tmp_path / "a/boots").read_text())
    kept["lock"]["kernel"] = "of another start"
    (tmp_path / "a/boots").write_text(json.dumps(kept))
    with folder(tmp_path / "a") as snapshot_folder:
        async with replica(dsn, "north", snapshot_folder=snapshot_folder) as again:
            version = await revoke(dsn)
            await again.feed_read()
            await again.announce()
            if signed_off:
                assert len(await replicas.wait(Target(dsn), version, 0)) == 1
            else:
                assert str(before.identity.boot.id) in await unconfirmed(dsn, version)
    with folder(tmp_path / "a") as snapshot_folder:
        async with replica(dsn, "north", snapshot_folder=snapshot_folder) as third:
            await third.feed_read()
            await third.announce()
            left = {row["id"] for row in await replicas.list_replicas(Target(dsn))}
            assert left - {str(third.identity.boot.id)} == (set() if signed_off else {str(before.identity.boot.id)})


async def test_one_of_the_version_before_that_signed_off_is_replaced(
    dsn: str, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    await fleet(connection)
    (tmp_path / "a").mkdir(mode=0o700)
    old = uuid.uuid4()
    (tmp_path / "a/replica-id").write_text(f"{old}\n")
    await connection.execute(
        "insert into replica (id, name, program_version, workers, longest_staleness_s, stopped_at, comes_back) "
        "values ($1, 'north', '0', 1, 900, clock_timestamp(), true)",
        old,
    )
    with folder(tmp_path / "a") as snapshot_folder:
        async with replica(dsn, "north", snapshot_folder=snapshot_folder) as new:
            await new.feed_read()
            await new.announce()
            assert [row["folder"] for row in await replicas.list_replicas(Target(dsn))] == [str(old)]


async def test_nobody_is_in_step_in_the_future(dsn: str, connection: asyncpg.Connection) -> None:
    await fleet(connection)
    async with replica(dsn, "north") as north:
        await north.feed_read()
        newest = north.follower.observed.looks[-1]
        await north.replica_table.announce(newest.position, newest.confirmed_at.replace(year=2200))
        assert await connection.fetchval("select confirmed_at <= clock_timestamp() from replica")


async def test_the_life_of_the_server_reads_the_same_in_every_session(dsn: str, connection: asyncpg.Connection) -> None:
    before = await connection.fetchrow("select registry_epoch(), registry_life()")
    await connection.execute("set timezone = 'Asia/Kolkata'; set datestyle = 'German'")
    assert await connection.fetchrow("select registry_epoch(), registry_life()") == before


async def test_each_role_can_do_its_part(postgres: Server, database: str, connection: asyncpg.Connection) -> None:
    give_roles(postgres, database)
    await fleet(connection)
    async with replica(postgres.dsn(database, SERVICE), "north") as north:
        await north.feed_read()
        await north.announce()
        assert (await north.replica_table.peers()).states["live"] == 1
        admin = Target(postgres.dsn(database, ADMIN))
        version = await registry_edits.set_device_status(admin, "ann", "d1", "revoked", "")
        assert version is not None
        await north.feed_read()
        await north.announce()
        assert len(await replicas.wait(admin, version, 0)) == 1
        assert len(await replicas.list_replicas(Target(postgres.dsn(database, READER)))) == 1
        await north.replica_table.sign_off(comes_back=False)
        assert await replicas.forget_replica(admin, "ann", "north") == 1
