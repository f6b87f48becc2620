"""``device enroll``: one device, or many from a CSV file."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import click

from authbackend.certificates import enroll as certificates_enroll
from authbackend.certificates.enroll import Enrolled, Request
from authbackend.cli.authorities import (
    file_type,
    folder_type,
    new_files,
    passphrase_of,
    passphrase_option,
    read_input,
    write_pair,
)
from authbackend.cli.ca import lines_of, result_of
from authbackend.cli.common import actor, json_option, run, show, target_of
from authbackend.errors import InvalidInput
from authbackend.pki import signing
from authbackend.pki.ca import AuthorityFolder
from authbackend.pki.files import write_file
from authbackend.pki.profiles import Profile
from authbackend.postgres.connection import Target
from authbackend.postgres.registry_edits import editing

COLUMNS = ("device_id", "type", "common_name", "csr")
_ONE_DAY_MANY = 100


@click.command("enroll")
@click.argument("device_id", required=False, metavar="[DEVICE]")
@click.option(
    "--ca",
    "directory",
    type=folder_type,
    required=True,
    metavar="DIR",
    help="Sign with the authority in DIR, made by ca init.",
)
@passphrase_option
@click.option(
    "--csr", type=file_type, metavar="FILE", help="The device's request (PKCS #10): its key stays on the device."
)
@click.option("--generate", is_flag=True, help="Generate the key here; for tests only.")
@click.option(
    "--from",
    "table",
    type=file_type,
    metavar="FILE.csv",
    help="Enroll many devices, one a line; columns device_id and, optionally, type, common_name, csr (a file).",
)
@click.option(
    "--type", "device_type", metavar="NAME", help="Register devices that are not registered yet, with this type."
)
@click.option(
    "--profile",
    "profile_name",
    default="device",
    show_default=True,
    metavar="NAME",
    help="Profile of DIR/authority.toml.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Where to write. One device: PATH.pem and PATH.key, default DEVICE. Many: a folder, or one file if it ends in .zip, default FILE.zip.",
)
@json_option
@click.pass_context
def enroll(
    context: click.Context,
    device_id: str | None,
    directory: Path,
    passphrase_file: Path | None,
    csr: Path | None,
    generate: bool,
    table: Path | None,
    device_type: str | None,
    profile_name: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """
    Issue certificates for devices, and put them on record in the same transaction.

    Only the key is taken from a request. A device may have several certificates, so that it can use the new one before
    the old one expires.
    """
    if (device_id is None) == (table is None):
        raise InvalidInput("give either a DEVICE or --from FILE.csv")
    if device_id is not None and (csr is None) != generate:
        raise InvalidInput("give either --csr FILE (the key stays on the device) or --generate (for tests)")
    if table is not None and csr is not None:
        raise InvalidInput("with --from, name requests in the column csr, not with --csr")
    target = target_of(context)
    authority = AuthorityFolder.open(directory, passphrase_of(passphrase_file))
    profile = authority.profile(profile_name, "client")
    if table is not None:
        _many(target, authority, profile, table, device_type, generate, out, as_json)
        return
    assert device_id is not None
    place = out or Path(device_id)
    new_files(*(place.with_name(f"{place.name}{suffix}") for suffix in (".pem", ".key")[: 2 if generate else 1]))
    request = Request(device_id, device_type, None, read_input(csr) if csr else None)
    (one,) = run(_enroll(target, authority, profile, [request]))
    files = write_pair(place, one.signed.chain_pem, one.key_pem)
    result = {"device_id": device_id, **result_of(one.signed, files)}
    show(result, as_json, lambda: lines_of(one.signed, files))


async def _enroll(
    target: Target, authority: AuthorityFolder, profile: Profile, requests: list[Request]
) -> list[Enrolled]:
    async with editing(target, actor()) as connection:
        return await certificates_enroll.enroll(connection, authority, profile, requests)


def _many(
    target: Target,
    authority: AuthorityFolder,
    profile: Profile,
    table: Path,
    device_type: str | None,
    generate: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    requests = list(_requests(table, device_type, generate))
    place = out or table.with_suffix(".zip")
    archive = place.suffix.lower() == ".zip"
    new_files(place if archive else place / "ca.pem")
    enrolled = run(_enroll(target, authority, profile, requests))
    files = dict(_files(authority, enrolled))
    try:
        if archive:
            write_file(place, _zipped(files), 0o600)
        else:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name, content in files.items():
                write_file(place / name, content, 0o600 if name.endswith(".key") else 0o644)
    except OSError as error:
        raise InvalidInput(f"{place}: {error.strerror}; the certificates are on record: revoke them") from error
    result = {
        "out": str(place),
        "devices": [{"device_id": one.device_id, **result_of(one.signed, [])} for one in enrolled],
    }

    def lines() -> Iterator[str]:
        yield f"enrolled {len(enrolled)} devices into {place}"
        if any(one.key_pem for one in enrolled):
            yield "it holds private keys that are not encrypted: bring them to the devices, then delete it"
        if len(enrolled) >= _ONE_DAY_MANY:
            end = min(one.signed.record.not_after for one in enrolled)
            yield f"all of them expire on {end:%Y-%m-%d}; to spread the renewals, enroll at several times or with several profiles"

    show(result, as_json, lines)


def _requests(table: Path, device_type: str | None, generate: bool) -> Iterator[Request]:
    try:
        yield from _rows(table, device_type, generate)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidInput(f"{table} is not CSV in UTF-8: {error}") from None


def _rows(table: Path, device_type: str | None, generate: bool) -> Iterator[Request]:
    reader = csv.DictReader(io.StringIO(read_input(table).decode("utf-8-sig"), newline=""), strict=True)
    columns = set(reader.fieldnames or ())
    if "device_id" not in columns or not columns <= set(COLUMNS):
        raise InvalidInput(
            f"{table}: the first line must name the columns: device_id and, optionally, {', '.join(COLUMNS[1:])}"
        )
    seen: set[str] = set()
    for row in reader:
        where = f"{table}:{reader.line_num}: "
        name = (row["device_id"] or "").strip()
        if None in row or not name or name in seen:
            fault = "too many fields" if None in row else f"duplicate device {name}" if name else "no device_id"
            raise InvalidInput(f"{where}{fault}")
        seen.add(name)
        request_file = (row.get("csr") or "").strip()
        if bool(request_file) == generate:
            raise InvalidInput(f"{where}name a file in the column csr, or generate all keys with --generate; not both")
        yield Request(
            name,
            (row.get("type") or "").strip() or device_type,
            (row.get("common_name") or "").strip() or None,
            read_input(table.parent / request_file) if request_file else None,
            where,
        )
    if not seen:
        raise InvalidInput(f"{table} names no device")


def _files(authority: AuthorityFolder, enrolled: list[Enrolled]) -> Iterator[tuple[str, bytes]]:
    yield "ca.pem", authority.certificate_pem + signing.certificate_pem(authority.root)
    for one in enrolled:
        yield f"{one.device_id}.pem", one.signed.chain_pem
        if one.key_pem is not None:
            yield f"{one.device_id}.key", one.key_pem


def _zipped(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o100600 if name.endswith(".key") else 0o100644) << 16
            archive.writestr(entry, data)
    return content.getvalue()
