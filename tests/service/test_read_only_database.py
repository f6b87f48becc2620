"""A replica follows a database that it cannot write; operations that must write report the fault."""

import asyncio
import contextlib
import json

import asyncpg
import pytest
from click.testing import CliRunner
from structlog.testing import capture_logs

from authbackend.cli import main
from authbackend.postgres import replicas
from authbackend.postgres.connection import Target
from tests.service.conftest import until

FULL = """
create function no_room() returns trigger language plpgsql as $$ begin
  raise exception 'could not extend file "base/1": No space left on device' using errcode = 'disk_full'; end $$;
create trigger no_room before insert or update on replica execute function no_room();
"""


@pytest.fixture
def read_only(postgres, database):
    """Make the database of the test read-only or writable by default, for sessions that do not set it themselves."""

    def change(to):
        postgres.psql(
            "postgres",
            f"alter database {database} set default_transaction_read_only = {to};"
            f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{database}';",
        )

    return change


@contextlib.asynccontextmanager
async def writing(dsn):
    connection = await asyncpg.connect(dsn, server_settings={"default_transaction_read_only": "off"})
    try:
        yield connection.execute
    finally:
        await connection.close()


async def health(service):
    status, text = await service.get("/health/ready")
    return status, json.loads(text)["fault"] or ""


def reported(service, words):
    async def condition():
        status, fault = await health(service)
        return status == 200 and words in fault

    return condition


async def test_a_read_only_database_is_followed(service, dsn, read_only):
    async def live():
        return [replica["state"] for replica in await replicas.list_replicas(Target(dsn))] == ["live"]

    await until(live, "it has announced itself")
    with capture_logs() as logged:
        read_only("on")
        await until(reported(service, "the database is read-only"), "it is reported, and the replica is ready")
        async with writing(dsn) as sql:
            await sql("update device set status = 'suspended' where device_id = 'APM0001'")
            await until(lambda: _is(service, "APM0001", "deny"), "the suspension is followed")
            await sql("update replica set introduced_at = '2020-01-01', confirmed_at = '2020-01-01'")
        (replica,) = await replicas.list_replicas(Target(dsn))
        assert (replica["state"], replica["may_answer"]) == ("silent", True)  # waiting for it works nevertheless
        read_only("off")
        await until(reported(service, ""), "it is ready")
        await until(lambda: _fault_is_over(service), "the fault is over")
    events = [line["event"] for line in logged]
    assert events.count("database.not_writable") == 1
    assert events.count("database.writable") == 1
    await until(live, "it has announced itself again")


async def test_a_full_disk_is_told_and_the_database_followed(service, sql):
    await sql(FULL)
    await until(reported(service, "the disk of the database is full (could not extend file"), "it is reported")
    await sql("update device set status = 'suspended' where device_id = 'APM0001'")
    await until(lambda: _is(service, "APM0001", "deny"), "the suspension is followed")
    await sql("drop trigger no_room on replica")
    await until(lambda: _fault_is_over(service), "the fault is over")


@pytest.mark.parametrize(
    "command",
    [
        ["device", "revoke", "APM0001", "--reason", "stolen"],
        ["migrate", "--repair-triggers"],
        ["enforcement", "resume"],
    ],
)
async def test_a_command_that_writes_says_that_it_cannot(service, dsn, read_only, command):
    read_only("on")
    environment = {"AUTHBACKEND_DATABASE__DSN": dsn}
    result = await asyncio.to_thread(CliRunner(env=environment).invoke, main, command)
    assert "nothing was changed: the database is read-only (cannot execute" in result.stderr, result.output
    assert result.exit_code == 5


async def _is(service, device, answer):
    return await service.login(device) == answer


async def _fault_is_over(service):
    return (await health(service))[1] == ""
