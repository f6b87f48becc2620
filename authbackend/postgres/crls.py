"""Revocation lists in the database: what belongs on them, and the present list of each authority."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from authbackend.errors import NotFound
from authbackend.postgres.connection import Connection, Target, connected, name_actor
from authbackend.postgres.statements import load_statements

CHANNELS = ("certificate", "crl")
"""What is notified when certificates change, and when lists or authorities do."""


@dataclass(frozen=True, slots=True)
class StoredCrl:
    """A list as it is in the database."""

    number: int
    this_update: datetime
    next_update: datetime
    der: bytes


@dataclass(frozen=True, slots=True)
class Moment:
    """
    When a list is signed or taken over.

    Args:
        now: The database's time.
        kept: The highest number that a list of the authority ever had here; None: it had none.
        installed: The highest that the host of a node has reported; above ``kept`` after the database was restored.
        listed: How many certificates are known to be on the present list.
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
    """An authority, and its list if it has one yet."""

    name: str
    subject: str
    certificate_pem: str
    not_after: datetime
    list: StoredCrl | None


@dataclass(frozen=True, slots=True)
class Expiring:
    """
    How many active certificates without a successor end soon.

    Args:
        within: By device type (``unknown``: of no device): within 7, 30 and 90 days, each with those before.
        expired: Ended already, and the device is active.
        most_on_a_day: The most that end on one day of the next 90.
    """

    within: dict[str, tuple[int, int, int]]
    expired: int
    most_on_a_day: int


async def fetch_authorities(
    connection: Connection, name: str | None = None, known: Mapping[str, StoredCrl] | None = None
) -> list[StoredAuthority]:
    """
    Return authorities by name, or the one of that name.

    Args:
        known: Lists that the asker has, by authority: their contents, which can be megabytes, are not sent again.
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
    """Wait until nobody else signs the list of an authority; until the end of the transaction."""
    await connection.execute(load_statements("certificates").lock_list.sql, authority)


async def fetch_moment(connection: Connection, issuer: str) -> Moment:
    """Return the database's time, and the highest numbers of an authority's lists."""
    row = await connection.fetchrow(load_statements("certificates").signing.sql, issuer)
    assert row is not None
    kept, installed = (None if row[name] is None else int(row[name]) for name in ("kept", "installed"))
    return Moment(row["now"], kept, installed, row["listed"])


async def report_list(
    target: Target, node: str, issuer: str, number: int, next_update: datetime, counts_s: float
) -> None:
    """
    Note which list of an authority the host of a node has installed.

    Args:
        counts_s: How long the report counts, in seconds.
    Raises:
        InvalidInput: Another role reports for this node, or this role for another node.
        AuthbackendError: The database cannot be reached or refuses.
    """
    async with connected(target) as connection:
        statement = load_statements("certificates").report_list.sql
        await connection.execute(statement, node, issuer, str(number), next_update, counts_s)


async def list_installed(target: Target) -> list[dict[str, Any]]:
    """Return which lists the hosts of nodes say that they have installed, who says so, and whether that still counts."""
    async with connected(target) as connection:
        return [dict(row) for row in await connection.fetch(load_statements("certificates").installed.sql)]


async def forget_node(target: Target, actor: str, node: str) -> None:
    """
    Forget what the host of a node said that it had installed, and which role said it.

    Raises:
        NotFound: It said nothing.
    """
    async with connected(target) as connection, connection.transaction():
        await name_actor(connection, actor)
        if not await connection.fetchval(load_statements("certificates").forget_node.sql, node):
            raise NotFound(f"no node {node!r} has reported a revocation list; see: authbackend crl hosts")


async def fetch_revoked(
    connection: Connection, issuer: str, oldest_end: datetime
) -> Sequence[tuple[str, str, datetime]]:
    """Return serial number, reason and time of what belongs on a list; what ended before ``oldest_end`` does not."""
    rows = await connection.fetch(load_statements("certificates").revoked.sql, issuer, oldest_end)
    return [tuple(row) for row in rows]


async def save_crl(connection: Connection, authority: str, stored: StoredCrl, serials: Sequence[str]) -> None:
    """
    Make a list the present one.

    Args:
        serials: Of the certificates that are on it for good.
    Raises:
        InvalidInput: The present one is newer.
    """
    await connection.execute(
        load_statements("certificates").save_crl.sql,
        *(authority, str(stored.number), stored.this_update, stored.next_update, stored.der),
    )
    await connection.execute(
        load_statements("certificates").save_crl_entries.sql, authority, str(stored.number), list(serials)
    )


async def fetch_expiring(connection: Connection) -> Expiring:
    """Count what ends soon. Cost: an index over those that end within 90 days and one look for each."""
    statements = load_statements("certificates")
    types = await connection.fetch(statements.expiring_by_type.sql)
    days = await connection.fetch(statements.expiring_by_day.sql, timedelta(days=90))
    return Expiring(
        {row["type"]: (row["days7"], row["days30"], row["days90"]) for row in types},
        sum(row["expired"] for row in types),
        max((row["number"] for row in days), default=0),
    )
