"""Who may report the revocation list of a node's host, how long a report is valid, and what the audit trail has of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from authbackend.errors import AuthbackendError, Forbidden, InvalidInput
from authbackend.postgres import crls
from authbackend.postgres.connection import Target
from tests.postgres.test_roles import ADMIN, OUTSIDER, READER, SERVICE, give_roles
from tests.support.postgres import Server, connected

HOSTS = ("crl_one", "crl_two")


@pytest.fixture
async def target(
    postgres: Server, database: str, connection: asyncpg.Connection
) -> AsyncIterator[Callable[..., Target]]:
    """Return targets for the database by role; the hosts of two nodes have one role each."""
    give_roles(postgres, database)
    for host in HOSTS:
        await connection.execute(f"create role {host} login in role authbackend_crl_sync")
    yield lambda role: Target(postgres.dsn(database, role))
    for host in HOSTS:
        await connection.execute(f"drop role {host}")


async def report(target: Target, node: str, number: int = 5, counts_s: float = 220.0, issuer: str = "CN=ca") -> None:
    await crls.report_list(target, node, issuer, number, datetime.now(UTC) + timedelta(days=1), counts_s)


async def installed(target: Target) -> list[tuple[str, str, str, bool]]:
    return [(row["node"], row["role"], row["number"], row["counts"]) for row in await crls.list_installed(target)]


async def test_a_role_reports_for_its_node_and_for_no_other(target: Callable[..., Target]) -> None:
    await report(target("crl_one"), "rabbit@one", 5)
    await report(target("crl_one"), "rabbit@one", 7, issuer="CN=other")
    with pytest.raises(
        InvalidInput, match="role crl_one reports for node rabbit@one already, so it cannot report for node rabbit@two"
    ):
        await report(target("crl_one"), "rabbit@two", 9)
    await report(target("crl_two"), "rabbit@two", 6)
    assert await installed(target(READER)) == [
        ("rabbit@one", "crl_one", "5", True),
        ("rabbit@one", "crl_one", "7", True),
        ("rabbit@two", "crl_two", "6", True),
    ]


async def test_another_role_does_not_speak_for_a_node(target: Callable[..., Target]) -> None:
    await report(target("crl_one"), "rabbit@one", 5)
    with pytest.raises(
        InvalidInput, match="node rabbit@one is reported by role crl_one, not by role crl_two"
    ) as refused:
        await report(target("crl_two"), "rabbit@one", 9)
    assert "authbackend crl hosts --forget rabbit@one" in refused.value.detail
    assert await installed(target(READER)) == [("rabbit@one", "crl_one", "5", True)]


async def test_two_that_begin_at_once_are_told_apart(target: Callable[..., Target]) -> None:
    outcome = await asyncio.gather(*(report(target(host), "rabbit@one") for host in HOSTS), return_exceptions=True)
    assert sorted(type(each).__name__ for each in outcome) == ["InvalidInput", "NoneType"]
    assert len(await installed(target(READER))) == 1


async def test_a_node_that_was_forgotten_may_be_reported_by_another_role(
    target: Callable[..., Target], connection: asyncpg.Connection
) -> None:
    await report(target("crl_one"), "rabbit@one", 5)
    await crls.forget_node(target(ADMIN), "ann@ops1", "rabbit@one")
    await report(target("crl_two"), "rabbit@one", 6)
    assert await installed(target(READER)) == [("rabbit@one", "crl_two", "6", True)]
    rows = await connection.fetch("select * from audit where entity in ('crl_reporter', 'crl_installed') order by id")
    assert [(row["operation"], row["entity"], row["role"], row["claimed_by"]) for row in rows] == [
        ("INSERT", "crl_reporter", "crl_one", None),
        ("DELETE", "crl_installed", ADMIN, "ann@ops1"),
        ("DELETE", "crl_reporter", ADMIN, "ann@ops1"),
        ("INSERT", "crl_reporter", "crl_two", None),
    ]
    assert json.loads(rows[1]["before"])["number"] == 5


async def test_saying_the_same_again_leaves_no_row_in_the_trail(
    target: Callable[..., Target], connection: asyncpg.Connection
) -> None:
    await report(target("crl_one"), "rabbit@one", 5)
    before = await connection.fetchval("select count(*) from audit")
    await report(target("crl_one"), "rabbit@one", 6)
    assert await connection.fetchval("select count(*) from audit") == before


async def test_a_report_counts_as_long_as_it_says_by_the_clock_of_the_database(
    target: Callable[..., Target], connection: asyncpg.Connection
) -> None:
    await report(target("crl_one"), "rabbit@one", counts_s=60)
    assert await connection.fetchval("select counts_until - reported_at from crl_installed") == pytest.approx(
        timedelta(seconds=60), abs=timedelta(seconds=1)
    )
    await connection.execute("update crl_installed set counts_until = clock_timestamp()")
    assert await installed(target(READER)) == [("rabbit@one", "crl_one", "5", False)]
    await report(target("crl_one"), "rabbit@one")
    assert await installed(target(READER)) == [("rabbit@one", "crl_one", "5", True)]


@pytest.mark.parametrize("counts_s", [0.0, -1.0, 86401.0, float("inf"), float("nan")])
async def test_no_report_counts_for_ever(target: Callable[..., Target], counts_s: float) -> None:
    with pytest.raises(InvalidInput, match="1 second to a day"):
        await report(target("crl_one"), "rabbit@one", counts_s=counts_s)


async def test_a_host_of_the_version_before_goes_on_reporting(
    target: Callable[..., Target], connection: asyncpg.Connection
) -> None:
    async with connected(target("crl_one").dsn) as host:
        await host.execute("select crl_report('rabbit@one', 'CN=ca', 5, now())")
    assert await installed(target(READER)) == [("rabbit@one", "crl_one", "5", True)]


@pytest.mark.parametrize("role", [SERVICE, ADMIN, READER, OUTSIDER])
async def test_nobody_else_reports(target: Callable[..., Target], role: str) -> None:
    with pytest.raises(Forbidden):
        await report(target(role), "rabbit@one")


async def test_who_reports_reads_and_forgets_nothing(target: Callable[..., Target]) -> None:
    with contextlib.suppress(AuthbackendError):
        await report(target("crl_one"), "rabbit@one")
    for work in (crls.list_installed(target("crl_one")), crls.forget_node(target("crl_one"), "x", "rabbit@one")):
        with pytest.raises(Forbidden):
            await work
    async with connected(target("crl_one").dsn) as host:
        for table in ("crl_installed", "crl_reporter", "device", "audit"):
            for statement in (f"select from {table}", f"delete from {table}", f"insert into {table} default values"):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await host.execute(statement)
