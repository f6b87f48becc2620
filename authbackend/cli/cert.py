"""``cert list | show | revoke | import``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click

from authbackend.certificates.crl_publisher import save_authority, sign
from authbackend.cli import cert_import
from authbackend.cli.authorities import file_type, folder_type, passphrase_of, passphrase_option
from authbackend.cli.common import (
    actor,
    json_option,
    printable,
    run,
    settings_of,
    show,
    show_enforced,
    table,
    target_of,
)
from authbackend.errors import InvalidInput, Unconfirmed
from authbackend.pki.ca import AuthorityFolder
from authbackend.pki.crl import HOLD, REASONS
from authbackend.postgres import certificates as store
from authbackend.postgres import enforcement
from authbackend.postgres.connection import Target, connected
from authbackend.postgres.crls import StoredCrl
from authbackend.postgres.registry_edits import editing

_DURATION = re.compile(r"(\d{1,5})([dhw])")
_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
_MANY_ON_A_DAY = 50
_LIST = ("serial", "common_name", "device_id", "type", "not_after", "state", "reason", "renewed")


@click.group()
def cert() -> None:
    """List, import and revoke certificates on record."""


def duration(value: str) -> timedelta:
    """
    Parse a duration such as 30d, 12h or 2w.

    Raises:
        InvalidInput: It is written in another way.
    """
    match = _DURATION.fullmatch(value)
    if match is None:
        raise InvalidInput(f"{value!r} is not a duration; write it as 30d, 12h or 2w")
    return int(match[1]) * _UNITS[match[2]]


@cert.command("list")
@click.option("--device", "device_id", metavar="DEVICE", help="Only certificates of this device.")
@click.option("--state", type=click.Choice(["active", "revoked"]), help="Only certificates in this state.")
@click.option(
    "--expiring",
    metavar="DURATION",
    help="Only active certificates that expire within this time, such as 30d, 12h or 2w.",
)
@click.option("--limit", type=click.IntRange(1), default=1000, show_default=True, help="Show at most this many.")
@json_option
@click.pass_context
def list_(
    context: click.Context, device_id: str | None, state: str | None, expiring: str | None, limit: int, as_json: bool
) -> None:
    """
    List certificates in order of expiry.

    RENEWED: the device has another active certificate that expires later. With --expiring, days on which many expire
    are named. The time is that of the database.
    """
    target = target_of(context)
    within = duration(expiring) if expiring else None
    certificates = run(
        store.list_certificates(
            target,
            device_id=device_id,
            state="active" if expiring else state,
            within=within,
            limit=limit,
        )
    )
    days = run(store.expiring_by_day(target, within)) if within and device_id is None else []

    def lines() -> Iterator[str]:
        yield from table([_shown(row) for row in certificates], _LIST)
        if len(certificates) == limit:
            yield f"only the first {limit}; see --limit"
        yield from (f"many expire on one day: {number} without a successor on {day}" for day, number in _crowded(days))

    show([_plain(row) for row in certificates], as_json, lines)


def _crowded(days: list[tuple[Any, int]]) -> list[tuple[Any, int]]:
    """Return the days on which at least 50 expire, and at least a fifth of all."""
    total = sum(number for _, number in days)
    return [(day, number) for day, number in days if number >= _MANY_ON_A_DAY and number * 5 >= total]


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value.isoformat() if isinstance(value, datetime) else value for key, value in row.items()}


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "not_after": f"{row['not_after']:%Y-%m-%d %H:%M}", "renewed": "yes" if row["renewed"] else "no"}


@cert.command("show")
@click.argument("name", metavar="SERIAL|FINGERPRINT")
@json_option
@click.pass_context
def show_(context: click.Context, name: str, as_json: bool) -> None:
    """Show a certificate, by serial number or fingerprint."""

    async def get() -> dict[str, Any]:
        async with connected(target_of(context)) as connection:
            return await store.get_certificate(connection, name)

    certificate = _plain(run(get()))
    show(certificate, as_json, lambda: (f"{key:12} {printable(value)}" for key, value in certificate.items()))


@cert.command()
@click.argument("name", metavar="[SERIAL|FINGERPRINT]", required=False)
@click.option(
    "--device",
    "device_id",
    metavar="DEVICE",
    help="Revoke certificates of this device, with --all-but-newest or --all.",
)
@click.option("--all-but-newest", is_flag=True, help="Revoke all active ones except the one that was issued last.")
@click.option("--all", "every", is_flag=True, help="Revoke all active ones.")
@click.option(
    "--reason",
    default="unspecified",
    show_default=True,
    help=f"A reason of RFC 5280 ({', '.join(name for name in REASONS if name != HOLD)}), or any other text, which is unspecified on the list.",
)
@click.option(
    "--ca",
    "directory",
    type=folder_type,
    metavar="DIR",
    help="Sign the new revocation list immediately, with the authority in DIR.",
)
@passphrase_option
@click.option(
    "--wait",
    is_flag=True,
    help="Wait until every node is reported to have the list that refuses them and a last check has found nothing connected with them. Exit status 8 if that is not known in time.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0),
    metavar="SECONDS",
    default=30.0,
    show_default=True,
    help="Longest time that --wait waits, in seconds.",
)
@json_option
@click.pass_context
def revoke(
    context: click.Context,
    name: str | None,
    device_id: str | None,
    all_but_newest: bool,
    every: bool,
    reason: str,
    directory: Path | None,
    passphrase_file: Path | None,
    wait: bool,
    timeout: float,
    as_json: bool,
) -> None:
    """
    Revoke certificates for good; the device keeps its other ones.

    With --ca, the revocation and the new list are one transaction. Otherwise the service signs the list if it has the
    authority (pki.authority_dir); if not, run: authbackend crl sign DIR. To deny the device itself, use: authbackend
    device revoke.
    """
    if (name is None) == (device_id is None) or (device_id is not None) != (all_but_newest != every):
        raise InvalidInput("name one certificate, or give --device DEVICE with either --all-but-newest or --all")
    authority = AuthorityFolder.open(directory, passphrase_of(passphrase_file)) if directory else None
    lifetime = timedelta(seconds=settings_of(context).pki.crl_lifetime_s)
    chosen = (name, device_id, 1 if all_but_newest else 0)
    target = target_of(context)
    revoked, signed, version = run(_revoke(target, chosen, reason, authority, lifetime))
    result = {
        "revoked": revoked,
        "reason": reason,
        "crl_number": signed.number if signed else None,
        "crl_next_update": signed.next_update.isoformat() if signed else None,
    }

    def lines() -> Iterator[str]:
        for row in revoked:
            yield f"revoked {row['serial']} of {printable(row['common_name'])} ({reason})"
        if not revoked:
            yield "revoked already, or nothing to revoke; no certificate was changed"
        if revoked and authority is None:
            yield "nodes refuse it once they have a revocation list that names it: the service signs one if it has the authority (pki.authority_dir); if not, run: authbackend crl sign DIR"
        if signed is not None and authority is not None:
            yield f"revocation list {signed.number} of authority {authority.name} is in the database, valid until {signed.next_update:%Y-%m-%d %H:%M} UTC; which nodes have it: authbackend crl hosts"

    if not wait:
        show(result, as_json, lines)
    elif revoked:
        show_enforced(target, run(enforcement.enforced(target, version, timeout)), result, as_json, lines)
    else:
        _show_former(target, name, device_id, timeout, result, as_json, lines)


def _show_former(
    target: Target,
    name: str | None,
    device_id: str | None,
    timeout: float,
    result: dict[str, Any],
    as_json: bool,
    lines: Callable[[], Iterator[str]],
) -> None:
    """
    Wait for certificates that were revoked before, and print their receipts.

    Raises:
        Unconfirmed: As in :func:`show_enforced`, or there is no receipt.
    """

    async def revoked_before() -> list[str]:
        async with connected(target) as connection:
            chosen = await store.find_certificates(connection, name) if name else []
        chosen += await store.list_certificates(target, device_id=device_id, state="revoked") if device_id else []
        return [row["serial"] for row in chosen if row["state"] == "revoked"]

    serials = run(revoked_before())
    if not serials:
        show(result, as_json, lines)
        return
    tasks = run(enforcement.settled(target, "certificate", serials, timeout))
    show_enforced(target, tasks, result, as_json, lines)
    if unreceipted := sorted(set(serials) - {task["name"] for task in tasks or ()}):
        raise Unconfirmed(
            f"there is no receipt of the revocation of {', '.join(unreceipted[:5])}{' ...' if unreceipted[5:] else ''}: it was long ago, the certificate had already expired, or enforcement was off"
        )


async def _revoke(
    target: Target,
    chosen: tuple[str | None, str | None, int],
    reason: str,
    authority: AuthorityFolder | None,
    lifetime: timedelta,
) -> tuple[list[dict[str, Any]], StoredCrl | None, str]:
    name, device_id, kept = chosen
    async with editing(target, actor()) as connection:
        if device_id is not None:
            certificates = (await store.certificates_of(connection, device_id))[kept:]
        else:
            assert name is not None
            certificates = [await store.get_certificate(connection, name)]
        others = {row["issuer"] for row in certificates} - {authority.subject if authority else ""}
        if authority is not None and others:
            raise InvalidInput(
                f"issued by {', '.join(map(repr, sorted(others)))}, not by {authority.subject!r}: revoke it with the authority that issued it"
            )
        revoked = await store.revoke_certificates(connection, [row["fingerprint"] for row in certificates], reason)
        version = str(await connection.fetchval("select pg_current_xact_id()::text"))
        if authority is None:
            return revoked, None, version
        await save_authority(connection, authority)
        return revoked, await sign(connection, authority, lifetime), version


@cert.command("import")
@click.argument("paths", metavar="FILE|DIR|-...", nargs=-1, type=click.Path(allow_dash=True, path_type=Path))
@click.option(
    "--openssl-index",
    "index",
    type=file_type,
    metavar="index.txt",
    help="Import revocations from the database of `openssl ca`.",
)
@click.option(
    "--issuer", type=file_type, metavar="CA.pem", help="With --openssl-index: the authority that the index belongs to."
)
@json_option
@click.pass_context
def import_(
    context: click.Context, paths: tuple[Path, ...], index: Path | None, issuer: Path | None, as_json: bool
) -> None:
    """
    Put certificates of another authority on record: PEM or DER files, chains, folders, or standard input.

    Can be repeated: certificates that are on record stay as they are. Certificates of authorities are skipped; devices
    are found by the common name. In folders, files named *.pem, *.crt, *.cer and *.der are read. If something cannot be
    imported, it is named, the rest is imported (in batches), and the exit status is 2.
    """
    if not paths and index is None:
        raise InvalidInput("name files, folders or - for standard input")
    if (index is None) != (issuer is None):
        raise InvalidInput("--openssl-index and --issuer go together")
    target = target_of(context)
    report = cert_import.Report()
    if paths:
        run(cert_import.import_paths(target, actor(), paths, report))
    if index is not None and issuer is not None:
        run(cert_import.import_index(target, actor(), index, issuer, report))
    show(report.result(), as_json, report.lines)
    if report.faults:
        context.exit(2)
