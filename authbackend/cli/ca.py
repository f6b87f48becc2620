"""``ca init | show | issue-server | issue-client | renew``."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from authbackend.certificates.crl_publisher import save_authority
from authbackend.certificates.enroll import record
from authbackend.cli.authorities import (
    ROOT_KEY,
    authority_argument,
    file_type,
    folder_type,
    given_passphrase,
    new_files,
    passphrase_of,
    passphrase_option,
    read_input,
    root_passphrase_option,
    write_pair,
)
from authbackend.cli.common import actor, json_option, run, show, target_of
from authbackend.errors import ConfigurationError, InvalidInput
from authbackend.pki import signing
from authbackend.pki.bench_certificates import RENEW_WITHIN, read_pair
from authbackend.pki.ca import AuthorityFolder, Signed, create_authority, renew_intermediate
from authbackend.pki.parsing import (
    KEY_KINDS,
    PKIError,
    PublicKey,
    new_key,
    normal_server_name,
    read_certificate,
    read_request,
    record_of,
    server_names,
)
from authbackend.pki.profiles import Profile
from authbackend.postgres.connection import Target, database_time
from authbackend.postgres.registry_edits import editing

offline_option = click.option(
    "--offline",
    is_flag=True,
    help="Issue without a database, by the clock of this machine. Put it on record later: authbackend cert import FILE.",
)


keep_option = click.option(
    "--keep",
    is_flag=True,
    help="Keep PATH.pem and PATH.key if this authority issued them for the same names and they are valid for at least 30 "
    "more days; otherwise replace them. Files of another authority are never replaced.",
)


@click.group()
def ca() -> None:
    """Run a small certificate authority, if you have none of your own."""


_ONE_PASSPHRASE = """\
authbackend: the root's key and the intermediate's have the same passphrase. Give the root's key another one:
  openssl pkcs8 -topk8 -v2 aes-256-cbc -in {root} -out NEW && chmod 600 NEW && mv NEW {root}"""

_WHERE = """
The root's key is needed again only to renew the intermediate (before {until:%Y-%m-%d}). Take it offline now:
  move {root} to a medium that you lock away, and keep its passphrase elsewhere,
  apart from that of {folder}/intermediate.key.
What goes where:
  broker    {folder}/ca.pem as /etc/rabbitmq/certs/ca.pem (ssl_options.cacertfile)
  devices   {folder}/ca.pem, beside their own certificate and key
  nowhere   {folder}/intermediate.key signs certificates: keep it here only
Next:
  authbackend ca issue-server {folder} --name HOST --out rabbitmq
  authbackend device enroll DEVICE --ca {folder} --csr DEVICE.csr
  authbackend crl sign {folder}"""


@ca.command("init")
@click.argument("directory", metavar="DIR", type=folder_type)
@click.option(
    "--name",
    metavar="NAME",
    help="Name of the authority and of its list, /crl/NAME.crl. Default: the last part of DIR.",
)
@click.option(
    "--root-out",
    "root_folder",
    type=folder_type,
    metavar="DIR",
    help="Write the root's key to this folder. Default: DIR/offline.",
)
@click.option(
    "--key",
    "key_kind",
    type=click.Choice(KEY_KINDS),
    default=KEY_KINDS[0],
    show_default=True,
    help="Kind of both keys.",
)
@passphrase_option
@root_passphrase_option
@json_option
def init(
    directory: Path,
    name: str | None,
    root_folder: Path | None,
    key_kind: str,
    passphrase_file: Path | None,
    root_passphrase_file: Path | None,
    as_json: bool,
) -> None:
    """
    Create an authority in DIR: a root, and an intermediate that signs.

    Each key is encrypted with a passphrase of its own, of at least 12 characters; equal ones are refused. No database is
    needed: validity goes by the clock of this machine, so make sure that it is right.
    """
    passphrase = passphrase_of(passphrase_file, new=True)
    root_passphrase = passphrase_of(root_passphrase_file, new=True, key=ROOT_KEY)
    place = root_folder or directory / "offline"
    named = name or directory.absolute().name
    try:
        root = create_authority(directory, named, passphrase, root_passphrase, root_folder=place, key_kind=key_kind)
    except OSError as error:
        raise InvalidInput(f"{error.filename or directory}: {error.strerror}") from error
    made = AuthorityFolder.open(directory, passphrase)
    result = {
        "name": made.name,
        "subject": made.subject,
        "not_after": made.not_after.isoformat(),
        "root_key": str(root),
    }
    where = _WHERE.format(folder=directory, root=root, until=made.not_after)
    show(result, as_json, lambda: [f"made authority {made.name}: {made.subject}", where])


@ca.command("show")
@authority_argument
@json_option
def show_(authority: AuthorityFolder, as_json: bool) -> None:
    """Show an authority and its profiles. Fails if its files do not belong together or the passphrase is wrong."""
    profiles = {
        name: {"purpose": profile.purpose, "lifetime_days": profile.lifetime.days, "key": profile.key}
        for name, profile in sorted(authority.profiles.items())
    }
    result = {
        "name": authority.name,
        "subject": authority.subject,
        "not_after": authority.not_after.isoformat(),
        "root_not_after": authority.root.not_valid_after_utc.isoformat(),
        "profiles": profiles,
    }

    def lines() -> list[str]:
        head = [f"{key:15} {result[key]}" for key in ("name", "subject", "not_after", "root_not_after")]
        return [*head, *(f"profile {name}: {' '.join(map(str, p.values()))}" for name, p in profiles.items())]

    show(result, as_json, lines)


@ca.command("issue-server")
@authority_argument
@click.option(
    "--name",
    "names",
    metavar="HOST",
    multiple=True,
    required=True,
    help="Host name or address of the server; may be repeated.",
)
@click.option(
    "--csr",
    type=file_type,
    metavar="FILE",
    help="The server's request (PKCS #10). Without it, a key is generated here.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="PATH", help="Write PATH.pem and PATH.key. Default: HOST."
)
@click.option(
    "--profile",
    "profile_name",
    default="server",
    show_default=True,
    metavar="NAME",
    help="Profile of DIR/authority.toml.",
)
@keep_option
@offline_option
@json_option
@click.pass_context
def issue_server(
    context: click.Context,
    authority: AuthorityFolder,
    names: tuple[str, ...],
    csr: Path | None,
    out: Path | None,
    profile_name: str,
    keep: bool,
    offline: bool,
    as_json: bool,
) -> None:
    """
    Issue a certificate for a server, for example a broker.

    Only the key is taken from a request; the names are those given here.
    """
    profile = authority.profile(profile_name, "server")
    common_name = next((name.lower() for name in names if ":" not in name and len(name) <= 64), "server")
    out = out or Path(names[0].replace(":", "_"))
    if keep and _kept(authority, common_name, names, csr, out, as_json):
        return
    _issue(context, authority, profile, common_name, names, csr, out, offline, as_json, replace=keep)


@ca.command("issue-client")
@authority_argument
@click.option("--name", required=True, metavar="ACCOUNT", help="Common name: the name of the account.")
@click.option(
    "--csr",
    type=file_type,
    metavar="FILE",
    help="The client's request (PKCS #10). Without it, a key is generated here.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="PATH", help="Write PATH.pem and PATH.key. Default: ACCOUNT."
)
@click.option(
    "--profile",
    "profile_name",
    default="service",
    show_default=True,
    metavar="NAME",
    help="Profile of DIR/authority.toml.",
)
@keep_option
@offline_option
@json_option
@click.pass_context
def issue_client(
    context: click.Context,
    authority: AuthorityFolder,
    name: str,
    csr: Path | None,
    out: Path | None,
    profile_name: str,
    keep: bool,
    offline: bool,
    as_json: bool,
) -> None:
    """Issue a certificate for the client of an account. For a device, use: authbackend device enroll."""
    profile = authority.profile(profile_name, "client")
    out = out or Path(name)
    if keep and _kept(authority, name, (), csr, out, as_json):
        return
    _issue(context, authority, profile, name, (), csr, out, offline, as_json, replace=keep)


def _issue(
    context: click.Context,
    authority: AuthorityFolder,
    profile: Profile,
    common_name: str,
    names: tuple[str, ...],
    csr: Path | None,
    out: Path,
    offline: bool,
    as_json: bool,
    *,
    replace: bool,
) -> None:
    if not replace:
        new_files(*(out.with_name(f"{out.name}{suffix}") for suffix in (".pem", ".key")[: 1 if csr else 2]))
    key = None if csr else new_key(profile.key)
    public_key = read_request(read_input(csr))[1] if csr else key.public_key() if key else None
    assert public_key is not None
    not_of = "device" if profile.purpose == "client" else ""
    signed = _signed(context, authority, (common_name, public_key, profile, names), offline, not_of)
    files = write_pair(out, signed.chain_pem, signing.key_pem(key) if key else None)
    show(result_of(signed, files), as_json, lambda: lines_of(signed, files))


_ToSign = tuple[str, PublicKey, Profile, Sequence[str]]


def _signed(
    context: click.Context, authority: AuthorityFolder, what: _ToSign, offline: bool, not_of: str = ""
) -> Signed:
    """Sign by the database's clock and put on record; offline, only sign, by the clock of this machine."""
    if offline:
        return authority.sign(*what, now=datetime.now(UTC))
    return run(_sign_and_record(_recording_target(context), authority, what, not_of))


def _kept(
    authority: AuthorityFolder, common_name: str, names: tuple[str, ...], csr: Path | None, out: Path, as_json: bool
) -> bool:
    """
    Show the existing certificate and return True if it can be kept; return False if one must be issued.

    Raises:
        InvalidInput: Another authority issued the existing one.
        PKIError: The existing files cannot be read, or do not belong together.
    """
    if csr is not None:
        raise InvalidInput("--keep generates the key itself: leave --csr out")
    pair = read_pair(out.parent, out.name)
    if pair is None:
        return False
    files = [str(out.with_name(f"{out.name}{suffix}")) for suffix in (".key", ".pem")]
    certificate = read_certificate(pair.certificate_pem)
    if not authority.has_signed(certificate):
        raise InvalidInput(
            f"{files[1]} was not issued by authority {authority.name} and is left as it is: to issue a new one, move it and {files[0]} away"
        )
    existing = record_of(certificate)
    wanted = frozenset(map(normal_server_name, names))
    if existing.common_name != common_name or (names and server_names(pair.certificate_pem) != wanted):
        return False
    if existing.not_after - datetime.now(UTC) < RENEW_WITHIN:
        return False
    result = {
        "serial": existing.serial,
        "fingerprint": existing.fingerprint,
        "common_name": existing.common_name,
        "not_after": existing.not_after.isoformat(),
        "files": [],
    }
    show(result, as_json, lambda: [f"kept {' '.join(files)}: {existing.subject}, until {existing.not_after:%Y-%m-%d}"])
    return True


def _recording_target(context: click.Context) -> Target:
    try:
        return target_of(context)
    except ConfigurationError as error:
        raise ConfigurationError(f"{error.detail}; or use --offline and import the certificate later") from error


async def _sign_and_record(target: Target, authority: AuthorityFolder, what: _ToSign, not_of: str) -> Signed:
    async with editing(target, actor()) as connection:
        name = what[0]
        if not_of and await connection.fetchval("select exists (select from device where common_name = $1)", name):
            raise InvalidInput(f"{name!r} is the common name of a device; use: authbackend device enroll")
        signed = authority.sign(*what, now=await database_time(connection))
        await save_authority(connection, authority)
        await record(connection, [(signed, None)])
        return signed


def result_of(signed: Signed, files: list[str]) -> dict[str, Any]:
    """Return an issued certificate's details as JSON values."""
    issued = signed.record
    return {
        "serial": issued.serial,
        "fingerprint": issued.fingerprint,
        "common_name": issued.common_name,
        "not_after": issued.not_after.isoformat(),
        "files": files,
    }


def lines_of(signed: Signed, files: list[str]) -> list[str]:
    """Return an issued certificate's details as lines for people."""
    lines = [f"wrote {' '.join(files)}: {signed.record.subject}, until {signed.record.not_after:%Y-%m-%d}"]
    if signed.shortened:
        lines.append("it ends with the authority, earlier than its profile says; see: authbackend ca renew")
    return lines


@ca.command()
@click.argument("directory", metavar="DIR", type=folder_type)
@passphrase_option
@click.option("--root-key", type=file_type, metavar="FILE", help="Renew the intermediate with this root's key.")
@root_passphrase_option
@click.option(
    "--server",
    "servers",
    type=file_type,
    metavar="FILE.pem",
    multiple=True,
    help="Renew this server's certificate: same names, new key; may be repeated.",
)
@offline_option
@json_option
@click.pass_context
def renew(
    context: click.Context,
    directory: Path,
    passphrase_file: Path | None,
    root_key: Path | None,
    root_passphrase_file: Path | None,
    servers: tuple[Path, ...],
    offline: bool,
    as_json: bool,
) -> None:
    """
    Renew the intermediate authority, or certificates of servers.

    The intermediate keeps its name and key, so what it signed stays valid: bring the new ca.pem to brokers and devices
    before the old one expires. A server's files are replaced; its old certificate stays valid until it expires. An
    authority made by an older version may have one passphrase for both keys: it is tried if none is given for the root's
    key, and a message says how to change it.
    """
    if root_key is None and not servers:
        raise InvalidInput(
            "nothing to renew: give --root-key FILE for the intermediate, or --server FILE.pem for a server"
        )
    passphrase = passphrase_of(passphrase_file)
    lines, result = [], {}
    if root_key is not None:
        until = _renew_intermediate(directory, root_key, root_passphrase_file, passphrase)
        result["intermediate"] = until.isoformat()
        lines.append(f"renewed {directory / 'intermediate.pem'} and {directory / 'ca.pem'}, until {until:%Y-%m-%d}")
    authority = AuthorityFolder.open(directory, passphrase)
    for server in servers:
        signed, files = _renew_server(context, authority, server, offline)
        result[str(server)] = signed.record.not_after.isoformat()
        lines += lines_of(signed, files)
    show(result, as_json, lambda: lines)


def _renew_intermediate(
    directory: Path, root_key: Path, root_passphrase_file: Path | None, passphrase: bytes
) -> datetime:
    given = given_passphrase(root_passphrase_file, key=ROOT_KEY)
    root_passphrase = passphrase if given is None else given
    try:
        until = renew_intermediate(directory, root_key, root_passphrase)
    except PKIError as error:
        if given is not None:
            raise
        raise PKIError(
            f"{error.detail} (none was given for the root's key: {ROOT_KEY.option} FILE or {ROOT_KEY.variable})"
        ) from error
    if root_passphrase == passphrase:
        click.echo(_ONE_PASSPHRASE.format(root=root_key), err=True)
    return until


def _renew_server(
    context: click.Context, authority: AuthorityFolder, server: Path, offline: bool
) -> tuple[Signed, list[str]]:
    pem = read_input(server)
    names = sorted(server_names(pem))
    old = record_of(read_certificate(pem))
    if old.issuer != authority.subject or not names:
        raise InvalidInput(f"{server} is not a server's certificate of authority {authority.name}")
    profile = authority.profile("server", "server")
    key = new_key(profile.key)
    signed = _signed(context, authority, (old.common_name, key.public_key(), profile, names), offline)
    return signed, write_pair(server.with_suffix(""), signed.chain_pem, signing.key_pem(key))
