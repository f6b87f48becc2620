"""Certificates on record; private keys never come here."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any, NamedTuple

from authbackend.errors import Conflict, InvalidInput, NotFound
from authbackend.postgres.connection import Connection, Target, connected, database_time
from authbackend.postgres.statements import load_statements


class CertificateRow(NamedTuple):
    """
    A row of the table ``certificate``.

    Args:
        device_id: None: the device that has the common name, if there is one.
        reason: With the state ``revoked``.
    """

    fingerprint: str
    serial: str
    issuer: str
    subject: str
    common_name: str
    not_before: datetime
    not_after: datetime
    device_id: str | None = None
    state: str = "active"
    reason: str = ""
    revoked_at: datetime | None = None
    key_fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class Inserted:
    """
    What became of certificates that were to be put on record.

    Args:
        new: Fingerprints.
        unknown: Common names of new ones that no device has.
        present: How many were there already.
        collided: Serial numbers of others, which are the same as that of another certificate of the issuer.
    """

    new: list[str]
    unknown: list[str]
    present: int
    collided: list[str]


async def insert_certificates(connection: Connection, rows: Sequence[CertificateRow]) -> Inserted:
    """
    Put certificates on record.

    Raises:
        InvalidInput: The database refuses one.
    """
    statements = load_statements("certificates")
    rows = list({row.fingerprint: row for row in rows}.values())
    found = await connection.fetch(statements.insert_certificates.sql, *map(list, zip(*rows, strict=True)))
    new = {row["fingerprint"]: row["device_id"] for row in found}
    others = [row for row in rows if row.fingerprint not in new]
    present = {
        row["fingerprint"]
        for row in await connection.fetch(statements.present_fingerprints.sql, [row.fingerprint for row in others])
    }
    return Inserted(
        list(new),
        [row.common_name for row in rows if row.fingerprint in new and new[row.fingerprint] is None],
        len(present),
        [row.serial for row in others if row.fingerprint not in present],
    )


async def compromised_keys(connection: Connection, fingerprints: Sequence[str]) -> set[str]:
    """Return those of these keys that a certificate was revoked for as compromised."""
    rows = await connection.fetch(load_statements("certificates").compromised_keys.sql, list(fingerprints))
    return {row["key_fingerprint"] for row in rows}


async def link_devices(connection: Connection, fingerprints: Sequence[str]) -> int:
    """Give those of these certificates that are of no device and valid to the devices of their names; return how many."""
    return int(await connection.fetchval(load_statements("certificates").link_devices.sql, list(fingerprints)))


async def list_certificates(
    target: Target,
    *,
    device_id: str | None = None,
    state: str | None = None,
    within: timedelta | None = None,
    limit: int = 1000,
) -> list[dict[str, Any]]:
    """
    Return certificates by the end of their validity, at most ``limit``, with type and status of their devices.

    Args:
        within: Only those that have not ended and end within this time from now, by the database's clock.
    """
    statement = load_statements("certificates").certificates.sql
    async with connected(target) as connection:
        found = await connection.fetch(statement, device_id, state, within, limit, None, None)
        return [dict(row) for row in found]


async def expiring_by_day(target: Target, within: timedelta) -> list[tuple[date, int]]:
    """Return how many active certificates without a successor end on which day, from now on, by the database's clock."""
    async with connected(target) as connection:
        found = await connection.fetch(load_statements("certificates").expiring_by_day.sql, within)
        return [(row["day"], row["number"]) for row in found]


async def find_certificates(connection: Connection, name: str) -> list[dict[str, Any]]:
    """
    Return the certificates with a serial number or fingerprint; colons, spaces, 0x and upper case are accepted.

    Raises:
        InvalidInput: It is neither.
    """
    written = re.fullmatch("(-?)(?:0x)?([0-9a-f]{1,256})", name.lower().replace(":", "").replace(" ", ""))
    if written is None:
        raise InvalidInput(f"{name!r} is neither a serial number nor a SHA-256 fingerprint, in hexadecimal digits")
    digits = written[2]
    found = await connection.fetch(
        load_statements("certificates").certificates.sql,
        *(None, None, None, 1000),
        digits if len(digits) == 64 else None,
        f"{int(written[1] + digits, 16):x}",
    )
    return [dict(row) for row in found]


async def get_certificate(connection: Connection, name: str) -> dict[str, Any]:
    """
    Return the one certificate with a serial number or fingerprint.

    Raises:
        NotFound: There is none.
        Conflict: Several issuers used that serial number.
    """
    found = await find_certificates(connection, name)
    if not found:
        raise NotFound(f"no certificate on record has the serial number or fingerprint {name!r}")
    if len(found) > 1:
        named = "; ".join(f"{row['fingerprint']} of {row['issuer']}" for row in found)
        raise Conflict(f"several certificates have the serial number {name!r}; name one by its fingerprint: {named}")
    return found[0]


async def certificates_of(connection: Connection, device_id: str) -> list[dict[str, Any]]:
    """
    Return the active certificates of a device, the newest first: the one whose validity began last.

    One that is not valid yet, by the database's clock, comes last: it was made by a clock that was wrong.

    Raises:
        NotFound: There is no such device.
    """
    if not await connection.fetchval("select exists (select from device where device_id = $1)", device_id):
        raise NotFound(f"no device has the id {device_id!r}")
    statement = load_statements("certificates").certificates.sql
    found = [dict(r) for r in await connection.fetch(statement, device_id, "active", None, 100000, None, None)]
    now = await database_time(connection)
    return sorted(found, key=lambda row: (row["not_before"] <= now, row["not_before"], row["added_at"]), reverse=True)


async def revoke_certificates(connection: Connection, fingerprints: Iterable[str], reason: str) -> list[dict[str, Any]]:
    """
    Revoke certificates for good and return those that were active.

    Raises:
        InvalidInput: The reason is one of those that would not be final, or too long.
    """
    found = await connection.fetch(load_statements("certificates").revoke_certificates.sql, list(fingerprints), reason)
    return [dict(row) for row in found]


async def revoke_listed(
    connection: Connection, issuer: str, listed: Sequence[tuple[str, str, datetime]]
) -> tuple[int, int]:
    """
    Take over what an authority lists as revoked.

    Args:
        issuer: Subject of the authority, RFC 4514.
        listed: Serial number, reason, time.
    Returns:
        How many were revoked now, and how many listed ones are not on record.
    """
    statements = load_statements("certificates")
    columns = [list(column) for column in zip(*listed, strict=True)] or [[], [], []]
    changed = await connection.fetch(statements.revoke_listed.sql, issuer, *columns)
    known = await count_on_record(connection, issuer, columns[0])
    return len(changed), len(set(columns[0])) - known


async def count_on_record(connection: Connection, issuer: str, serials: Collection[str]) -> int:
    """Return how many of an issuer's serial numbers are on record."""
    return int(await connection.fetchval(load_statements("certificates").known_serials.sql, issuer, list(serials)))


async def save_authority(
    connection: Connection, name: str, subject: str, certificate: str, not_after: datetime
) -> None:
    """
    Make an authority known, or its renewed certificate.

    Raises:
        Conflict: Another authority has the name, or another name has the subject.
        InvalidInput: The database refuses it.
    """
    statements = load_statements("certificates")
    await connection.execute(statements.save_authority.sql, name, subject, certificate, not_after)
    if await connection.fetchval(statements.authority_subject.sql, name) != subject:
        raise Conflict(f"another authority is called {name!r} already; choose another name")
