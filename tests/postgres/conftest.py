"""Fixtures of the database tests: a database that many tests share, each in a transaction that is rolled back."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest

from tests.support.postgres import Server, connected


@pytest.fixture(scope="session")
def shared_database(postgres: Server, unbraked_template: str) -> str:
    """The name of a migrated database that only tests with ``scratch`` use."""
    name = "shared"
    postgres.psql("postgres", f"create database {name} template {unbraked_template}")
    return name


@pytest.fixture
async def scratch(postgres: Server, shared_database: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection in a transaction that is rolled back at the end: fast, for tests that need only one session."""
    async with connected(postgres.dsn(shared_database)) as connection:
        transaction = connection.transaction()
        await transaction.start()
        yield connection
        if not connection.is_closed():
            await transaction.rollback()
