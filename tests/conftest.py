"""Fixtures for every test that needs a database: a real PostgreSQL, and a fresh migrated database for each test."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Iterator

import asyncpg
import pytest

from authbackend.postgres.connection import Target
from authbackend.postgres.migrate import migrate
from tests.support.postgres import DEFAULT_VERSION, BinariesMissing, Server, connected, run, unprivileged_user

TEMPLATE = "registry_template"
UNBRAKED = "registry_without_brake"
_version = pytest.StashKey[str]()
_numbers = itertools.count(1)


def pytest_configure(config: pytest.Config) -> None:
    """
    Take the version out of the environment: the service, which many tests start, refuses a name that is no setting.

    With ``-n`` this process only starts others that run the tests; they inherit the environment, and make no user at once.
    """
    if config.getoption("dist", "no") == "no":
        config.stash[_version] = os.environ.pop("AUTHBACKEND_TEST_POSTGRES", DEFAULT_VERSION)
    else:
        unprivileged_user()


@pytest.fixture(scope="session")
def postgres_version(pytestconfig: pytest.Config) -> str:
    """The version of PostgreSQL in AUTHBACKEND_TEST_POSTGRES (15 to 18, default 18)."""
    return pytestconfig.stash[_version]


@pytest.fixture(scope="session")
def postgres(postgres_version: str) -> Iterator[Server]:
    """A running PostgreSQL; with ``-n``, each process has its own."""
    fault = None
    try:
        server = Server(postgres_version)
    except BinariesMissing as error:
        fault = str(error)
    if fault is not None:
        pytest.fail(fault, pytrace=False)
    try:
        server.create()
        server.start()
        yield server
    finally:
        server.remove()


# What is not about the brake changes what it likes; and the trail begins empty.
NO_BRAKE = """
alter table brake disable trigger audit_i;
insert into brake (devices) values (1000000000);
alter table brake enable always trigger audit_i;
"""


@pytest.fixture(scope="session")
def migrated_template(postgres: Server) -> str:
    """The name of a migrated database that nobody connects to: a template for copies."""
    postgres.psql("postgres", f"create database {TEMPLATE}")
    run(migrate(Target(postgres.dsn(TEMPLATE))))
    return TEMPLATE


@pytest.fixture(scope="session")
def unbraked_template(postgres: Server, migrated_template: str) -> str:
    """The name of a template without a limit on mass changes."""
    postgres.psql("postgres", f"create database {UNBRAKED} template {migrated_template}")
    postgres.psql(UNBRAKED, NO_BRAKE)
    return UNBRAKED


@pytest.fixture
async def database(postgres: Server, unbraked_template: str) -> AsyncIterator[str]:
    """The name of a fresh, migrated database of this test's own."""
    name = f"test_{next(_numbers)}"
    async with connected(postgres.dsn("postgres")) as admin:
        await admin.execute(f"create database {name} template {unbraked_template} strategy file_copy")
    yield name
    if postgres.running:
        async with connected(postgres.dsn("postgres")) as admin:
            await admin.execute(f"drop database if exists {name} with (force)")


@pytest.fixture
def dsn(postgres: Server, database: str) -> str:
    """The URI of a fresh, migrated database of this test's own, as superuser."""
    return postgres.dsn(database)


@pytest.fixture
async def connection(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to ``dsn``."""
    async with connected(dsn) as opened:
        yield opened
