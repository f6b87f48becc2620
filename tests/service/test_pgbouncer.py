"""The service refuses to start with a pooler in transaction mode; one in session mode works."""

import asyncio
import configparser
import os
import sys
from pathlib import Path

import asyncpg
import pytest

from authbackend.postgres import pooling
from authbackend.postgres.connection import Target, connected
from tests.service.conftest import HASH, POLICY, apply, running, until
from tests.support.pgbouncer import pgbouncer

FIELD = configparser.ConfigParser()
FIELD.read(Path(__file__).parent.parent / "cases/field/env/pgbouncer-transaction.ini")
FIELD = FIELD["pgbouncer"]


def pooled(folder, database):
    return f"postgresql://postgres@/{database}?host={folder}&port=6432"


async def serve(dsn):
    """Run the command until it exits; return its exit status and output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AUTHBACKEND_")}
    environment |= {f"AUTHBACKEND_{name}__LISTEN": "127.0.0.1:0" for name in ("BROKER", "ADMIN", "HEALTH")}
    environment |= {"AUTHBACKEND_DATABASE__DSN": dsn}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "authbackend", "serve"), env=environment, stderr=asyncio.subprocess.PIPE
    )
    try:
        _, output = await asyncio.wait_for(process.communicate(), 30)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise AssertionError("it started") from None
    return process.returncode, output.decode()


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(pooling, "_session_pooling", set())


@pytest.mark.parametrize(
    "settings",
    [
        {"pool_mode": "transaction"},
        {"pool_mode": "transaction", "server_round_robin": "1"},
        {"pool_mode": "transaction", "default_pool_size": "1"},
        {"pool_mode": "statement"},
        {"pool_mode": "transaction", "ignore_startup_parameters": "statement_timeout"},
        {name: FIELD[name] for name in ("pool_mode", "default_pool_size")},
    ],
    ids=lambda settings: " ".join(map("=".join, settings.items())),
)
async def test_a_pooler_of_transactions_is_refused_at_the_start(postgres, database, dsn, settings):
    with pgbouncer(postgres, **settings) as folder:
        target = pooled(folder, database)
        busy = [await asyncpg.connect(target, statement_cache_size=0) for _ in range(2)]  # fill the pool
        for other in busy:
            await other.execute("select 1")
        try:
            code, output = await serve(target)
        finally:
            for other in busy:
                other.terminate()
    assert code == 2
    assert "pooler with transaction or statement pooling" in output
    assert "connect to PostgreSQL directly, or to a pool with pool_mode = session" in output


async def test_a_service_that_started_without_the_database_tells_it(postgres, database, dsn):
    await apply(dsn, POLICY.replace("HASH", f'"{HASH}"'))
    with pgbouncer(postgres, pool_mode="transaction") as folder:
        async with running(pooled(folder, database), wait=False) as service:

            async def reported():
                return "pool_mode = session" in (await service.get("/health/ready"))[1]

            await until(reported, "health says what is wrong with the pooler")
            assert not await service.ready()


async def test_a_pooler_of_sessions_is_worked_with(postgres, database, dsn, connection):
    with pgbouncer(postgres, pool_mode="session") as folder:
        target = pooled(folder, database)
        await apply(target, POLICY.replace("HASH", f'"{HASH}"'))
        async with running(target, REGISTRY__POLL_INTERVAL_S="60") as service:
            assert await service.login("APM0001") == "allow"
            await connection.execute("update device set status = 'suspended' where device_id = 'APM0001'")

            async def denied():
                return await service.login("APM0001") == "deny"

            await until(denied, "the notification came through")
        async with connected(Target(target, statement_timeout_s=7)) as pooled_connection:
            assert await pooled_connection.fetchval("show statement_timeout") == "7s"
