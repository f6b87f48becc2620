"""``crl sign | import | list | export | sync | hosts``."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click

from authbackend import logs
from authbackend.certificates.crl_publisher import CrlPublisher, InstallReporter, save_authority
from authbackend.certificates.crl_publisher import sign as sign_list
from authbackend.cli.authorities import authority_argument, file_type, folder_type, read_input
from authbackend.cli.common import actor, json_option, run, settings_of, show, table, target_of
from authbackend.errors import Conflict, InvalidInput, NotFound
from authbackend.pki import signing
from authbackend.pki.ca import AuthorityFolder
from authbackend.pki.client_tls import ClientTLS
from authbackend.pki.crl import HOLD, RevocationList, age_fault, check_entries, entries_of, list_pem, read_list
from authbackend.pki.crl_sync import Sync, Synced
from authbackend.pki.parsing import Certificate, PKIError, read_certificates
from authbackend.postgres import certificates as store
from authbackend.postgres import crls
from authbackend.postgres.connection import Target, connected
from authbackend.postgres.crls import StoredAuthority, StoredCrl
from authbackend.postgres.registry_edits import editing

_distribution_point = click.option(
    "--distribution-point",
    metavar="URL",
    help="Accept a list that names this distribution point. All certificates of the authority must name it, too: brokers refuse those that do not.",
)


@click.group()
def crl() -> None:
    """Sign and import revocation lists, and bring them to brokers."""


@crl.command()
@authority_argument
@click.option(
    "--watch", is_flag=True, help="Keep running: sign again after each revocation, and long before nextUpdate."
)
@json_option
@click.pass_context
def sign(context: click.Context, authority: AuthorityFolder, watch: bool, as_json: bool) -> None:
    """
    Sign the revocation list of an authority and publish it.

    Needed once at the start, then only if no replica has the authority (pki.authority_dir).
    """
    settings, target = settings_of(context), target_of(context)
    lifetime = timedelta(seconds=settings.pki.crl_lifetime_s)
    signed = run(_sign(target, authority, lifetime))
    result = {
        "authority": authority.name,
        "number": signed.number,
        "next_update": signed.next_update.isoformat(),
        "entries": sum(1 for _ in entries_of(signed.der)),
    }
    text = f"revocation list {signed.number} of authority {authority.name}: {result['entries']} revoked, valid until {signed.next_update:%Y-%m-%d %H:%M} UTC"
    show(result, as_json, lambda: [text])
    if watch:
        sys.stdout.flush()
        logs.configure(settings.log.format, settings.log.level)
        publisher = CrlPublisher(target, authority, settings.pki.crl_lifetime_s)
        run(_until_interrupted(publisher.run()))


async def _sign(target: Target, authority: AuthorityFolder, lifetime: timedelta) -> StoredCrl:
    async with editing(target, actor()) as connection:
        await save_authority(connection, authority)
        signed = await sign_list(connection, authority, lifetime, anyway=True)
        assert signed is not None
        return signed


async def _until_interrupted(work: Any) -> None:
    try:
        await work
    except asyncio.CancelledError:  # Ctrl-C
        return


@crl.command("import")
@click.argument("file", metavar="FILE", type=file_type)
@click.option(
    "--ca", "ca_file", type=file_type, required=True, metavar="CA.pem", help="The authority that signed the list."
)
@click.option(
    "--name", required=True, metavar="NAME", help="Name of the authority here: the list is served as /crl/NAME.crl."
)
@_distribution_point
@json_option
@click.pass_context
def import_(
    context: click.Context, file: Path, ca_file: Path, name: str, distribution_point: str | None, as_json: bool
) -> None:
    """
    Import the list of an outside authority: serve it, and mark the certificates on it as revoked.

    Run it whenever the authority has signed a new list, well before nextUpdate. Refused without any change: a list that
    the authority did not sign, that is not valid now, that is older than the current one, or with which brokers would
    refuse devices that are not on it.
    """
    authorities = _certificates(ca_file)
    try:
        crl_read, authority = read_list(read_input(file), authorities, distribution_point)
        check_entries(crl_read.der)
    except PKIError as error:
        raise InvalidInput(f"{file}: {error.detail}") from error
    pem = signing.certificate_pem(authority).decode("ascii")
    ends = authority.not_valid_after_utc
    revoked, unknown, held = run(_take_over(target_of(context), name, pem, ends, crl_read))
    result = {
        "authority": name,
        "number": crl_read.number,
        "next_update": crl_read.next_update.isoformat(),
        "revoked": revoked,
        "not_on_record": unknown,
        "on_hold": held,
    }

    def lines() -> Iterator[str]:
        yield f"revocation list {crl_read.number} of authority {name}, valid until {crl_read.next_update:%Y-%m-%d %H:%M} UTC"
        yield f"{revoked} certificates revoked now; {unknown} on the list are not on record"
        if held:
            yield f"{held} on hold: brokers refuse them while they are listed; on record they stay active"

    show(result, as_json, lines)


def _certificates(file: Path) -> list[Certificate]:
    try:
        return read_certificates(read_input(file))
    except PKIError as error:
        raise InvalidInput(f"{file}: {error.detail}") from error


async def _take_over(
    target: Target, name: str, pem: str, ends: datetime, crl_read: RevocationList
) -> tuple[int, int, int]:
    entries = list(entries_of(crl_read.der))
    listed = [(one.serial, one.reason or "unspecified", one.revoked_at) for one in entries if one.reason != HOLD]
    async with editing(target, actor()) as connection:
        await store.save_authority(connection, name, crl_read.issuer, pem, ends)
        await crls.lock_list(connection, name)
        moment = await crls.fetch_moment(connection, crl_read.issuer)
        if fault := age_fault(crl_read, moment.now):
            raise InvalidInput(f"the list cannot be used: {fault}")
        if moment.kept is not None and crl_read.number < moment.kept:
            raise Conflict(
                f"list number {crl_read.number} is older than number {moment.kept}, which the authority's lists have reached; nothing was changed"
            )
        stored = StoredCrl(crl_read.number, crl_read.this_update, crl_read.next_update, crl_read.der)
        await crls.save_crl(connection, name, stored, [serial for serial, _, _ in listed])
        revoked, unknown = await store.revoke_listed(connection, crl_read.issuer, listed)
    return revoked, unknown, len(entries) - len(listed)


async def _authorities(target: Target, name: str | None = None) -> list[StoredAuthority]:
    async with connected(target) as connection:
        return await crls.fetch_authorities(connection, name)


@crl.command("list")
@json_option
@click.pass_context
def list_(context: click.Context, as_json: bool) -> None:
    """List the authorities and their current revocation lists."""
    authorities = [
        {
            "authority": one.name,
            "subject": one.subject,
            "ends": one.not_after.isoformat(timespec="minutes"),
            "number": one.list.number if one.list else None,
            "entries": sum(1 for _ in entries_of(one.list.der)) if one.list else None,
            "this_update": one.list.this_update.isoformat(timespec="seconds") if one.list else None,
            "next_update": one.list.next_update.isoformat(timespec="seconds") if one.list else None,
        }
        for one in run(_authorities(target_of(context)))
    ]
    columns = ("authority", "subject", "ends", "number", "entries", "this_update", "next_update")
    show(authorities, as_json, lambda: table(authorities, columns))


@crl.command("export")
@click.argument("name", metavar="NAME")
@click.option("--der", is_flag=True, help="Write DER instead of PEM.")
@click.pass_context
def export(context: click.Context, name: str, der: bool) -> None:
    """Write an authority's current revocation list to standard output, as PEM."""
    authorities = run(_authorities(target_of(context), name))
    if not authorities or authorities[0].list is None:
        raise NotFound(f"no authority {name!r} has a revocation list; see: authbackend crl list")
    content = authorities[0].list.der
    click.echo(content if der else list_pem(content), nl=False)


@crl.command()
@click.option(
    "--url",
    "urls",
    multiple=True,
    required=True,
    metavar="URL",
    help="Fetch the list from http://REPLICA:8082/crl/NAME.crl, or https; several are alternatives.",
)
@click.option(
    "--ca", "ca_file", type=file_type, required=True, metavar="CA.pem", help="The authority that signs the list."
)
@click.option(
    "--tls-ca",
    type=file_type,
    metavar="FILE",
    help="For https: the authority of the servers' certificates, PEM. Default: the system's. Read again when it changes.",
)
@click.option(
    "--tls-cert",
    type=file_type,
    metavar="FILE",
    help="For https servers that ask for one: client certificate with its chain, PEM.",
)
@click.option("--tls-key", type=file_type, metavar="FILE", help="Key of --tls-cert, PEM, not encrypted.")
@click.option(
    "--dir",
    "folder",
    type=folder_type,
    required=True,
    metavar="DIR",
    help="Install the list in this folder, RabbitMQ's ssl_crl_hash_dir.",
)
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Shortest time between two checks, in seconds. With --once and --node: how often you run it.",
)
@click.option(
    "--node",
    metavar="rabbit@HOST",
    help="Report to the database which list this node has, so that revocations of certificates are done only when it has them. Needs a database role of its own, in role authbackend_crl_sync.",
)
@_distribution_point
@click.option(
    "--once",
    is_flag=True,
    help="Check once; exit status 0 if the list in DIR is then the one that is served, signed by the authority and valid now.",
)
@click.pass_context
def sync(
    context: click.Context,
    urls: tuple[str, ...],
    ca_file: Path,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    folder: Path,
    interval: float,
    distribution_point: str | None,
    once: bool,
    node: str | None,
) -> None:
    """
    Keep a broker's revocation list up to date; runs on the broker's host. Only --node needs the database.

    A list is installed only if the authority signed it, it is valid now, and it is not older than the installed one; the
    file is replaced atomically. The service answers as soon as the list changes, so a revocation does not wait for the
    interval. Errors are logged, and the installed list stays; once it is past nextUpdate, the broker refuses every
    certificate.
    """
    if wrong := [url for url in urls if not url.startswith(("http://", "https://"))]:
        raise InvalidInput(f"--url {wrong[0]}: write it as http://HOST:PORT/crl/NAME.crl")
    if (tls_ca or tls_cert or tls_key) and (plain := [url for url in urls if not url.startswith("https://")]):
        raise InvalidInput(
            f"--url {plain[0]} does not use TLS: write https://, or leave out --tls-ca, --tls-cert and --tls-key"
        )
    reporter = InstallReporter(target_of(context), node, interval) if node else None
    seen = reporter.seen if reporter else None
    tls = ClientTLS(tls_ca, tls_cert, tls_key)
    syncer = Sync(urls, _certificates(ca_file), folder, seen=seen, distribution_point=distribution_point, tls=tls)
    try:
        if once:
            synced = run(_once(syncer, reporter))
            state = "replaced" if synced.new else "is up to date"
            click.echo(
                f"{synced.path} {state}: number {synced.list.number}, valid until {synced.list.next_update:%Y-%m-%d %H:%M} UTC"
            )
            return
        log = settings_of(context).log
        logs.configure(log.format, log.level)
        run(_until_interrupted(_follow(syncer, interval, reporter)))
    except OSError as error:
        raise InvalidInput(f"{error.filename or folder}: {error.strerror}") from error


async def _once(syncer: Sync, reporter: InstallReporter | None) -> Synced:
    synced = await syncer.once()
    if reporter is not None:
        await reporter.report()
    return synced


async def _follow(syncer: Sync, interval: float, reporter: InstallReporter | None) -> None:
    if reporter is None:
        await syncer.run(interval)
        return
    reporting = asyncio.create_task(reporter.run())
    try:
        await syncer.run(interval)
    finally:
        reporting.cancel()


@crl.command()
@click.option("--forget", metavar="NODE", help="Forget a node that is gone for good or no longer reports.")
@json_option
@click.pass_context
def hosts(context: click.Context, forget: str | None, as_json: bool) -> None:
    """
    Show which revocation list each node has, as reported by crl sync --node on its host.

    Only ROLE may report for the node; after --forget, another role may. COUNTS is no when the last report is too old to
    know that the list is still there: revocations of certificates are then not done, and name the node.
    """
    target = target_of(context)
    if forget:
        run(crls.forget_node(target, actor(), forget))
    reports = [
        {
            **row,
            "next_update": row["next_update"].isoformat(timespec="seconds"),
            "reported_at": row["reported_at"].isoformat(timespec="seconds"),
        }
        for row in run(crls.list_installed(target))
    ]
    shown = [{**row, "counts": "yes" if row["counts"] else "no"} for row in reports]
    columns = ("node", "role", "issuer", "number", "next_update", "reported_at", "counts")
    show(reports, as_json, lambda: table(shown, columns))
