"""Read and write certificate revocation lists: what belongs on them, the current ones, and where they are installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from authbackend.errors import NotFound
from authbackend.postgres.connection import Connection, Target, connected, name_actor
from authbackend.postgres.statements import load_statements

CHANNELS = ("certificate", "crl")
"""The channels notified when certificates change, and when lists or authorities change."""


@dataclass(frozen=True, slots=True)
class StoredCrl:
    """A revocation list as stored in the database."""

    number: int
    this_update: datetime
    next_update: datetime
    der: bytes


@dataclass(frozen=True, slots=True)
class Moment:
    """
    What is known of an authority's lists at the time the next one is signed or imported.

    Args:
        now: The database's time.
        kept: The highest CRL number ever stored here; None if there was none.
        installed: The highest CRL number that a node's host has reported; above ``kept`` after the database was restored.
        listed: Number of certificates recorded as being on the current list.
    """

    now: datetime
    kept: int | None
    installed: int | None
    listed: int

    @property
    def highest(self) -> int | None:
        """The number that the next list must exceed."""
        return max((number for number in (self.kept, self.installed) if number is not None), default=None)


@dataclass(frozen=True, slots=True)
class StoredAuthority:
    """An authority, with its revocation list if it has one yet."""

    name: str
    subject: str
    certificate_pem: str
    not_after: datetime
    list: StoredCrl | None


@dataclass(frozen=True, slots=True)
class Expiring:
    """
    How many active certificates without a successor expire soon.

    Args:
        within: By device type (``unknown`` for no device), how many expire within 7, 30 and 90 days (cumulative).
        expired: How many have expired although their device is active.
        most_on_a_day: The most that expire on a single day of the next 90.
    """

    within: dict[str, tuple[int, int, int]]
    expired: int
    most_on_a_day: int


async def fetch_authorities(
    connection: Connection, name: str | None = None, known: Mapping[str, StoredCrl] | None = None
) -> list[StoredAuthority]:
    """
    Return all authorities by name, or only the named one.

    Args:
        known: Lists that the caller already has, by authority; their contents, which can be megabytes, are not fetched again.
    """
    known = known or {}
    marks = [f"{authority}:{stored.number}" for authority, stored in known.items()]
    rows = await connection.fetch(load_statements("certificates").lists.sql, name, marks)
    return [
        StoredAuthority(
            *(row["name"], row["subject"], row["certificate_pem"], row["not_after"]),
            None
            if row["number"] is None
            else StoredCrl(
                int(row["number"]),
                row["this_update"],
                row["next_update"],
                known[row["name"]].der if row["der"] is None else row["der"],
            ),
        )
        for row in rows
    ]


async def lock_list(connection: Connection, authority: str) -> None:
    """Lock the list of an authority until the end of the transaction, so that only one process signs it."""
    await connection.execute(load_statements("certificates").lock_list.sql, authority)


async def fetch_moment(connection: Connection, issuer: str) -> Moment:
    """Return the database's time and the highest CRL numbers of an authority."""
    row = await connection.fetchrow(load_statements("certificates").signing.sql, issuer)
    assert row is not None
    kept, installed = (None if row[name] is None else int(row[name]) for name in ("kept", "installed"))
    return Moment(row["now"], kept, installed, row["listed"])


async def report_list(
    target: Target, node: str, issuer: str, number: int, next_update: datetime, counts_s: float
) -> None:
    """
    Record which list of an authority is installed on the host of a node.

    Args:
        counts_s: How long the report is valid, in seconds.
    Raises:
        InvalidInput: Another role reports for this node, or this role reports for another node.
        AuthbackendError: The database cannot be reached or refuses.
    """
    async with connected(target) as connection:
        statement = load_statements("certificates").report_list.sql
        await connection.execute(statement, node, issuer, str(number), next_update, counts_s)


async def list_installed(target: Target) -> list[dict[str, Any]]:
    """Return the lists reported as installed, by node, with the reporting role and whether the report is still valid."""
    async with connected(target) as connection:
        return [dict(row) for row in await connection.fetch(load_statements("certificates").installed.sql)]


async def forget_node(target: Target, actor: str, node: str) -> None:
    """
    Delete the reports of a node's host, so that another role can report for it.

    Raises:
        NotFound: It has reported nothing.
    """
    async with connected(target) as connection, connection.transaction():
        await name_actor(connection, actor)
        if not await connection.fetchval(load_statements("certificates").forget_node.sql, node):
            raise NotFound(f"no node {node!r} has reported a revocation list; see: authbackend crl hosts")


async def fetch_revoked(
    connection: Connection, issuer: str, oldest_end: datetime
) -> Sequence[tuple[str, str, datetime]]:
    """Return serial number, reason and time of the revocations to list: of certificates that end after ``oldest_end``."""
    rows = await connection.fetch(load_statements("certificates").revoked.sql, issuer, oldest_end)
    return [tuple(row) for row in rows]


async def save_crl(connection: Connection, authority: str, stored: StoredCrl, serials: Sequence[str]) -> None:
    """
    Store a list as the current one of an authority.

    Args:
        serials: The serial numbers on it, without temporary entries (certificateHold).
    Raises:
        InvalidInput: The current one is newer.
    """
    await connection.execute(
        load_statements("certificates").save_crl.sql,
        *(authority, str(stored.number), stored.this_update, stored.next_update, stored.der),
    )
    await connection.execute(
        load_statements("certificates").save_crl_entries.sql, authority, str(stored.number), list(serials)
    )


async def fetch_expiring(connection: Connection) -> Expiring:
    """Count the certificates that expire soon. Cost: an index scan over 90 days, with one lookup per certificate."""
    statements = load_statements("certificates")
    types = await connection.fetch(statements.expiring_by_type.sql)
    days = await connection.fetch(statements.expiring_by_day.sql, timedelta(days=90))
    return Expiring(
        {row["type"]: (row["days7"], row["days30"], row["days90"]) for row in types},
        sum(row["expired"] for row in types),
        max((row["number"] for row in days), default=0),
    )
