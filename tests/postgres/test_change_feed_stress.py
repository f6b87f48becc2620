"""Many concurrent writers against the real reader: every refresh is compared with the database in the same snapshot."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg

from authbackend.postgres.connection import Target
from tests.support.postgres import connected
from tests.support.registry import CheckedFeed, Following, contents, copied, fleet

DEVICES = 2000
SECONDS = float(os.environ.pop("AUTHBACKEND_TEST_STRESS_SECONDS", "10"))
EXPECTED = (  # errors that conflicting writers must expect
    asyncpg.SerializationError,
    asyncpg.UniqueViolationError,
    asyncpg.ForeignKeyViolationError,
    asyncpg.DeadlockDetectedError,
)


class Writers:
    """Make random changes of every kind to a registry, and record what each counting writer has committed."""

    def __init__(self, dsn: str, seed: int) -> None:
        self.dsn = dsn
        self.random = random.Random(seed)
        self.committed: list[tuple[int, str, int]] = []  # version, device, number
        self.counts: dict[str, int] = {}

    def some(self) -> str:
        return f"d{self.random.randint(1, DEVICES)}"

    async def run(self, until: float) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(4):
                tasks.create_task(self.count(f"w{number}", until))
            for _ in range(4):
                tasks.create_task(self.anything(until))
            tasks.create_task(self.every(0.4, self.prune, until))
            tasks.create_task(self.every(0.7, self.disturb, until))

    async def count(self, device: str, until: float) -> None:
        """Commit 1, 2, 3, ... to one device, in transactions of every kind, and record the versions."""
        async with connected(self.dsn) as connection:
            number = 0
            while time.monotonic() < until:
                isolation: Any = self.random.choice(["read_committed", "repeatable_read", "serializable"])
                with contextlib.suppress(*EXPECTED):
                    async with connection.transaction(isolation=isolation):
                        await connection.fetchval("select count(*) from device_type")
                        if self.random.random() < 0.3:
                            await asyncio.sleep(self.random.random() * 0.1)
                        async with connection.transaction():
                            await connection.execute(
                                "update device set attributes = jsonb_build_object('n', $2::text) where device_id = $1",
                                *(device, str(number + 1)),
                            )
                        version = int(await connection.fetchval("select pg_current_xact_id()::text"))
                        if self.random.random() < 0.1:
                            await asyncio.sleep(self.random.random() * 0.5)
                    number += 1
                    self.committed.append((version, device, number))
                await asyncio.sleep(self.random.random() * 0.02)

    async def anything(self, until: float) -> None:
        actions = [
            self.status,
            self.bulk,
            self.move,
            self.swap,
            self.replace,
            self.rules,
            self.undo,
            self.idle,
            self.types,
        ]
        async with connected(self.dsn) as connection:
            while time.monotonic() < until:
                action = self.random.choice(actions)
                with contextlib.suppress(*EXPECTED):
                    await action(connection)
                    self.counts[action.__name__] = self.counts.get(action.__name__, 0) + 1
                await asyncio.sleep(self.random.random() * 0.02)

    async def every(self, seconds: float, action: Callable[[], Awaitable[None]], until: float) -> None:
        while time.monotonic() < until:
            await action()
            await asyncio.sleep(seconds)

    async def status(self, connection: asyncpg.Connection) -> None:
        status = self.random.choice(["pending", "active", "suspended", "revoked"])
        await connection.execute("update device set status = $2 where device_id = $1", self.some(), status)

    async def bulk(self, connection: asyncpg.Connection) -> None:
        size = self.random.choice([10, 300, 1500])
        await connection.execute(
            "update device set status_reason = $1 where substr(device_id, 1, 1) = 'd' and hashtext(device_id) % 2000 between 0 and $2",
            *(str(self.random.random()), size),
        )

    async def move(self, connection: asyncpg.Connection) -> None:
        await connection.execute(
            "update device set device_id = $2, common_name = $2 where device_id = $1",
            *(self.some(), f"d{self.random.randint(1, 2 * DEVICES)}"),
        )

    async def swap(self, connection: asyncpg.Connection) -> None:
        one, two = self.some(), self.some()
        async with connection.transaction():
            found = await connection.fetch(
                "select device_id, common_name from device where device_id = any ($1)", [one, two]
            )
            names = {row[0]: row[1] for row in found}
            if len(names) == 2:
                await connection.execute(
                    "update device set common_name = case device_id when $1 then $4 else $3 end where device_id in ($1, $2)",
                    *(one, two, names[one], names[two]),
                )

    async def replace(self, connection: asyncpg.Connection) -> None:
        device = self.some()
        async with connection.transaction():
            await connection.execute("delete from device where device_id = $1", device)
            if self.random.random() < 0.3:
                await asyncio.sleep(self.random.random() * 0.2)
            if self.random.random() < 0.7:
                await connection.execute("insert into device (device_id, type) values ($1, 'agv')", device)

    async def rules(self, connection: asyncpg.Connection) -> None:
        if self.random.random() < 0.02:
            await connection.execute("truncate topic_rule")
        device = self.some()
        await connection.execute(
            "insert into topic_rule (device_id, effect, action, topic) select device_id, 'allow', 'publish', $2 from device where device_id = $1",
            *(device, f"t/{self.random.randint(1, 5)}"),
        )
        await connection.execute(
            "delete from topic_rule where device_id = any (select device_id from topic_rule where device_id is not null limit 2)"
        )

    async def undo(self, connection: asyncpg.Connection) -> None:
        async with connection.transaction():
            savepoint = connection.transaction()
            await savepoint.start()
            await connection.execute("update device set status = 'revoked' where device_id = $1", self.some())
            await savepoint.rollback()
            await connection.execute("update device set status = 'active' where device_id = $1", self.some())
            if self.random.random() < 0.5:
                raise asyncpg.SerializationError("rolled back on purpose")

    async def idle(self, connection: asyncpg.Connection) -> None:
        async with connection.transaction():
            await connection.fetchval("select pg_current_xact_id()")
            await asyncio.sleep(self.random.random() * 0.6)

    async def types(self, connection: asyncpg.Connection) -> None:
        vhosts = self.random.sample(["/", "a", "b", "c"], 2)
        await connection.execute("update device_type set vhosts = $1 where name = 'agv'", vhosts)
        await connection.execute("update account set vhosts = $1", vhosts)

    async def prune(self) -> None:
        async with connected(self.dsn) as connection:
            await connection.fetchval("select change_prune('1.5 s')")

    async def disturb(self) -> None:
        async with connected(self.dsn) as connection:
            await connection.execute(
                self.random.choice(["vacuum device", "vacuum change", "analyze device", "select 1"])
            )


def check_versions(follower: Following, committed: list[tuple[int, str, int]]) -> None:
    """Assert that the copy serves a version exactly if it has what that transaction wrote, or something newer."""
    for version, name, number in committed:
        device = follower.device(name)
        assert device is not None
        held = int((device.attributes or {}).get("n", 0))
        assert follower.position.serves(version) == (held >= number), (version, name, number, held, follower.position)


async def test_no_refresh_misses_anything_while_many_write(dsn: str, connection: asyncpg.Connection) -> None:
    seed = random.randrange(10**6)
    await fleet(connection, DEVICES)
    await connection.execute("insert into device (device_id, type) select 'w' || n, 'agv' from generate_series(0, 3) n")
    feed = CheckedFeed(Target(dsn))
    writers = Writers(dsn, seed)
    followed = loaded = changed = 0
    async with copied(dsn, feed) as follower:
        writing = asyncio.create_task(writers.run(time.monotonic() + SECONDS))
        lags = random.Random(seed)
        while not writing.done():
            await asyncio.sleep(lags.choice([0, 0.01, 0.05, 0.3, 2.0 if lags.random() < 0.1 else 0.1]))
            refreshed = await follower.copy.refresh()
            if refreshed.full:
                loaded += 1
            else:
                followed += 1
                changed += refreshed.changed
                assert feed.truth is not None
                assert contents(follower.store) == feed.truth, f"seed {seed}"
            follower.devices()
            check_versions(follower, writers.committed)
        await writing
        await follower.copy.refresh()
        check_versions(follower, writers.committed)
        assert await follower.agrees(), f"seed {seed}"
        assert await follower.copy.compare() == 0
    print(
        f"seed {seed}: {followed} refreshes, {changed} rows, {loaded} loads, {len(writers.committed)} versions, {writers.counts}"
    )
    assert followed > 10
    assert changed > 100
    assert len(writers.committed) > 50
