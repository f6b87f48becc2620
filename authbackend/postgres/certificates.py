"""Read and write the table ``certificate``, and the authorities; private keys are never stored."""

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
        device_id: None links it to the device with its common name, if there is one.
        reason: Why it was revoked; empty if it is not.
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
    Result of :func:`insert_certificates`.

    Args:
        new: Fingerprints of the certificates inserted.
        unknown: Common names of inserted certificates that belong to no device.
        present: Number already on record.
        collided: Serial numbers rejected because another certificate of the same issuer has them.
    """

    new: list[str]
    unknown: list[str]
    present: int
    collided: list[str]


async def insert_certificates(connection: Connection, rows: Sequence[CertificateRow]) -> Inserted:
    """
    Insert the certificates that are not on record yet.

    Raises:
        InvalidInput: The database rejects one.
    """
    statements = load_statements("certificates")
    rows = list({row.fingerprint: row for row in rows}.values())
    inserted = await connection.fetch(statements.insert_certificates.sql, *map(list, zip(*rows, strict=True)))
    new = {row["fingerprint"]: row["device_id"] for row in inserted}
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
    """Return those of the keys that have a certificate revoked for key compromise."""
    rows = await connection.fetch(load_statements("certificates").compromised_keys.sql, list(fingerprints))
    return {row["key_fingerprint"] for row in rows}


async def link_devices(connection: Connection, fingerprints: Sequence[str]) -> int:
    """Link active certificates without a device to the device with their common name; return how many were linked."""
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
    Return up to ``limit`` certificates, ordered by expiry, with the type and status of their devices.

    Args:
        within: Only certificates that expire within this time from now, by the database's clock.
    """
    statement = load_statements("certificates").certificates.sql
    async with connected(target) as connection:
        return [dict(r) for r in await connection.fetch(statement, device_id, state, within, limit, None, None)]


async def expiring_by_day(target: Target, within: timedelta) -> list[tuple[date, int]]:
    """Count active certificates without a successor by day of expiry, from now on, by the database's clock."""
    async with connected(target) as connection:
        rows = await connection.fetch(load_statements("certificates").expiring_by_day.sql, within)
        return [(row["day"], row["number"]) for row in rows]


async def find_certificates(connection: Connection, name: str) -> list[dict[str, Any]]:
    """
    Return the certificates with this serial number or fingerprint; colons, spaces, 0x and upper case are accepted.

    Raises:
        InvalidInput: ``name`` is neither.
    """
    number = re.fullmatch("(-?)(?:0x)?([0-9a-f]{1,256})", name.lower().replace(":", "").replace(" ", ""))
    if number is None:
        raise InvalidInput(f"{name!r} is neither a serial number nor a SHA-256 fingerprint in hexadecimal digits")
    digits = number[2]
    rows = await connection.fetch(
        load_statements("certificates").certificates.sql,
        *(None, None, None, 1000),
        digits if len(digits) == 64 else None,
        f"{int(number[1] + digits, 16):x}",
    )
    return [dict(row) for row in rows]


async def get_certificate(connection: Connection, name: str) -> dict[str, Any]:
    """
    Return the one certificate with this serial number or fingerprint.

    Raises:
        NotFound: There is none.
        Conflict: Several issuers used that serial number.
    """
    matches = await find_certificates(connection, name)
    if not matches:
        raise NotFound(f"no certificate on record has the serial number or fingerprint {name!r}")
    if len(matches) > 1:
        listed = "; ".join(f"{row['fingerprint']} of {row['issuer']}" for row in matches)
        raise Conflict(f"several certificates have the serial number {name!r}; give a fingerprint instead: {listed}")
    return matches[0]


async def certificates_of(connection: Connection, device_id: str) -> list[dict[str, Any]]:
    """
    Return the active certificates of a device, newest start of validity first.

    Certificates that are not valid yet, by the database's clock, come last: they were issued under a wrong clock.

    Raises:
        NotFound: There is no such device.
    """
    if not await connection.fetchval("select exists (select from device where device_id = $1)", device_id):
        raise NotFound(f"no device has the id {device_id!r}")
    statement = load_statements("certificates").certificates.sql
    rows = [dict(r) for r in await connection.fetch(statement, device_id, "active", None, 100000, None, None)]
    now = await database_time(connection)
    return sorted(rows, key=lambda row: (row["not_before"] <= now, row["not_before"], row["added_at"]), reverse=True)


async def revoke_certificates(connection: Connection, fingerprints: Iterable[str], reason: str) -> list[dict[str, Any]]:
    """
    Revoke certificates permanently and return those that were active.

    Raises:
        InvalidInput: The reason is not permanent (certificateHold), or is too long.
    """
    rows = await connection.fetch(load_statements("certificates").revoke_certificates.sql, list(fingerprints), reason)
    return [dict(row) for row in rows]


async def revoke_listed(
    connection: Connection, issuer: str, listed: Sequence[tuple[str, str, datetime]]
) -> tuple[int, int]:
    """
    Revoke the certificates that an authority lists as revoked.

    Args:
        issuer: Subject of the authority, RFC 4514.
        listed: Serial number, reason and time of each entry.
    Returns:
        How many certificates were revoked now, and how many listed ones are not on record.
    """
    statements = load_statements("certificates")
    columns = [list(column) for column in zip(*listed, strict=True)] or [[], [], []]
    changed = await connection.fetch(statements.revoke_listed.sql, issuer, *columns)
    known = await count_on_record(connection, issuer, columns[0])
    return len(changed), len(set(columns[0])) - known


async def count_on_record(connection: Connection, issuer: str, serials: Collection[str]) -> int:
    """Return how many of these serial numbers of an issuer are on record."""
    return int(await connection.fetchval(load_statements("certificates").known_serials.sql, issuer, list(serials)))


async def save_authority(
    connection: Connection, name: str, subject: str, certificate: str, not_after: datetime
) -> None:
    """
    Add an authority, or replace its certificate by a renewed one.

    Raises:
        Conflict: Another authority has the name, or another name has the subject.
        InvalidInput: The database rejects it.
    """
    statements = load_statements("certificates")
    await connection.execute(statements.save_authority.sql, name, subject, certificate, not_after)
    if await connection.fetchval(statements.authority_subject.sql, name) != subject:
        raise Conflict(f"another authority is already called {name!r}; choose another name")
