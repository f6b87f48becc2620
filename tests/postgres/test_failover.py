"""Fail-over between two real servers with streaming replication."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Iterator

import asyncpg
import pytest
from structlog.testing import capture_logs

from authbackend.errors import Unavailable
from authbackend.postgres import migrate as migrations
from authbackend.postgres.connection import Target, connect
from authbackend.postgres.connection import connected as connected_to
from tests.support.postgres import Server, connected, run, until
from tests.support.registry import Following, fleet, following

DEVICES = 10_000


class Pair:
    """A primary and its standby."""

    def __init__(self, primary: Server, standby: Server) -> None:
        self.primary = primary
        self.standby = standby

    def uri(self, *servers: Server, more: str = "") -> str:
        """Return a URI with these servers as hosts, in this order."""
        folders = ",".join(str(server.folder) for server in servers)
        return f"postgresql://postgres@/registry?host={folders}{more}"

    @property
    def both(self) -> str:
        """Return a URI with both servers, as replicas use it."""
        return self.uri(self.standby, self.primary)

    def synchronous(self) -> None:
        """Make commits on the primary wait for the standby."""
        self.primary.psql("postgres", "alter system set synchronous_standby_names = '*'")
        self.primary.psql("postgres", "select pg_reload_conf()")

    async def streaming(self, state: str) -> None:
        """Wait until the standby has caught up in this state (sync or async)."""

        async def caught_up() -> bool:
            sql = "select sync_state || ' ' || (replay_lsn = pg_current_wal_lsn())::text from pg_stat_replication"
            async with connected(self.primary.dsn("registry")) as connection:
                return bool(await connection.fetchval(sql) == f"{state} true")

        await until(caught_up, f"the standby streams, {state}")

    def fail_over(self) -> None:
        """Crash the primary, and promote the standby."""
        self.primary.stop("immediate")
        self.standby.run("pg_ctl", "promote", "-w", "-D", self.standby.data)


@pytest.fixture
def pair(postgres: Server) -> Iterator[Pair]:
    primary = Server(postgres.version)
    standby = Server(postgres.version)
    try:
        primary.create()
        primary.start()
        primary.psql("postgres", "create database registry")

        async def fill() -> None:
            await migrations.migrate(Target(primary.dsn("registry")))
            async with connected(primary.dsn("registry")) as connection:
                await fleet(connection)
                await connection.execute(
                    f"insert into device (device_id, type) select 'n' || n, 'agv' from generate_series(1, {DEVICES - 3}) n"
                )

        run(fill())
        primary.run("pg_basebackup", "-D", standby.data, "-R", "-X", "stream", "-c", "fast")
        standby.start()
        yield Pair(primary, standby)
    finally:
        standby.remove()
        primary.remove()


@contextlib.asynccontextmanager
async def followed(uri: str) -> AsyncIterator[Following]:
    """A copy that follows by itself, as in production."""
    follower = Following(uri)
    async with following(follower.copy):

        async def loaded() -> bool:
            return follower.loaded

        await until(loaded, "the copy is loaded")
        yield follower
    await follower.feed.close()


def status(follower: Following, device_id: str) -> str:
    device = follower.device(device_id)
    assert device is not None
    return str(device.status)


async def test_the_primary_is_found_whatever_the_order(pair: Pair) -> None:
    for servers in itertools.permutations((pair.primary, pair.standby)):
        for more in ("", "&target_session_attrs=primary", "&target_session_attrs=read-write"):
            async with connected_to(Target(pair.uri(*servers, more=more))) as connection:
                assert not await connection.fetchval("select pg_is_in_recovery()")
    with pytest.raises(Unavailable, match="server is a standby or read-only, which target_session_attrs"):
        await connect(Target(pair.uri(pair.standby, more="&target_session_attrs=primary")))
    pair.primary.stop("immediate")
    with pytest.raises(
        Unavailable, match="no host .*: the server is a standby or read-only.*: PostgreSQL cannot be reached"
    ):
        await connect(Target(pair.both))


async def test_a_synchronous_standby_takes_over_and_nothing_committed_is_missed(pair: Pair) -> None:
    pair.synchronous()
    await pair.streaming("sync")
    committed: list[str] = []

    async def revoke() -> None:
        async with connected(pair.primary.dsn("registry")) as connection:
            for number in itertools.count(1):
                await connection.execute("update device set status = 'revoked' where device_id = $1", f"n{number}")
                committed.append(f"n{number}")

    async with followed(pair.both) as follower:
        before = follower.position
        with capture_logs() as logged:
            revoking = asyncio.create_task(revoke())

            async def busy() -> bool:
                return len(committed) >= 50 and status(follower, "n10") == "revoked"

            await until(busy, "changes are made and followed")
            await asyncio.to_thread(pair.fail_over)
            promoted = time.monotonic()
            with contextlib.suppress(OSError, asyncpg.PostgresError):
                await revoking

            async def again() -> bool:
                return follower.position.epoch != before.epoch and follower.copy.fault is None

            await until(again, "the new primary is followed")
            took_s = time.monotonic() - promoted
            assert {status(follower, device_id) for device_id in committed} == {"revoked"}
            async with connected(pair.standby.dsn("registry")) as connection:
                await connection.execute("update device set status = 'suspended' where device_id = 'd1'")

            async def followed_on() -> bool:
                return status(follower, "d1") == "suspended"

            await until(followed_on, "what the new primary commits is followed")
    assert follower.store.sizes()["device"] == DEVICES
    assert took_s < 3, f"followed {took_s:.2f} s after the promotion"
    assert "registry.served_changes_gone" not in [line["event"] for line in logged]
    assert sum(follower.observed.gone) == 0


async def test_a_change_that_an_asynchronous_standby_lacks_is_alarmed_by_name(pair: Pair) -> None:
    await pair.streaming("async")
    async with followed(pair.both) as follower:
        before = follower.position
        # Commits from now on do not reach the standby.
        pair.standby.psql("postgres", "alter system set primary_conninfo = ''")
        pair.standby.psql("postgres", "select pg_reload_conf()")

        async def cut() -> bool:
            async with connected(pair.primary.dsn("registry")) as connection:
                return not await connection.fetchval("select count(*) from pg_stat_replication")

        await until(cut, "the standby does not stream any more")
        async with connected(pair.primary.dsn("registry")) as connection:
            await connection.execute("update account set tags = '{monitoring}'")
            await connection.execute("update device set status = 'revoked' where device_id = 'd1'")
            await connection.execute("delete from device where device_id = 'd2'")
            await connection.execute("insert into device (device_id, type) values ('new', 'agv')")

        async def served() -> bool:
            return status(follower, "d1") == "revoked" and follower.device("new") is not None

        await until(served, "the changes are served")
        with capture_logs() as logged:
            await asyncio.to_thread(pair.fail_over)
            # A change on the new primary is not among the lost ones, whether made before or after replicas follow it.
            async with connected(pair.standby.dsn("registry")) as connection:
                for _ in range(20):  # beyond the lost transaction ids
                    await connection.execute("select pg_current_xact_id()")
                await connection.execute("update device set status = 'suspended' where device_id = 'd3'")

            async def again() -> bool:
                return follower.position.epoch != before.epoch and status(follower, "d3") == "suspended"

            await until(again, "the new primary is followed")

            async def alarmed() -> bool:
                return bool(follower.observed.gone)

            await until(alarmed, "what was served has been compared")
        assert status(follower, "d1") == "active"  # the new primary is authoritative
        assert follower.device("d2") is not None
        assert follower.device("new") is None
    (alarm,) = [line for line in logged if line["event"] == "registry.served_changes_gone"]
    accounts = [name for name in alarm["named"] if name.startswith("account ")]
    assert alarm["named"] == [*accounts, "device d1", "device d2", "device new"]
    assert len(accounts) == 1
    assert alarm["log_level"] == "error"
    assert follower.observed.gone == [4]
