"""``audit export``."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import click

from authbackend.cli.authorities import file_type, new_files
from authbackend.cli.common import printable, run, target_of
from authbackend.errors import AuthbackendError, InvalidInput
from authbackend.pki.files import replacing
from authbackend.policy_file.read import parse_time
from authbackend.postgres.audit import TrailEnd, TrailFilter
from authbackend.postgres.audit import export as export_trail
from authbackend.postgres.connection import Target


@click.group()
def audit() -> None:
    """Export the audit trail: who changed what, with the values before and after."""


@audit.command()
@click.option("--since", metavar="TIME", help="Only rows written at TIME or later: ISO 8601, UTC if it names no zone.")
@click.option("--until", metavar="TIME", help="Only rows written before TIME.")
@click.option("--table", "entities", metavar="NAME", multiple=True, help="Only rows about this table; may be repeated.")
@click.option("--key", metavar="KEY", help="Only rows about this key, for example a device id.")
@click.option("--who", metavar="NAME", help="Only rows of this person or role (columns actor and role).")
@click.option("--claimed-by", metavar="NAME", help="Only rows whose client claimed this name (column claimed_by).")
@click.option(
    "--operation",
    type=click.Choice(["INSERT", "UPDATE", "DELETE", "TRUNCATE", "ACCEPT", "ENABLE TRIGGER"]),
    help="Only rows of this operation.",
)
@click.option(
    "--from-version",
    type=click.IntRange(0, 2**64 - 1),
    metavar="TRANSACTION",
    help="Only rows of this transaction or later ones. To continue an export, give its next_version.",
)
@click.option(
    "--out",
    type=file_type,
    metavar="FILE",
    help="Write to FILE, mode 600, instead of standard output. It appears only when it is complete.",
)
@click.pass_context
def export(
    context: click.Context,
    since: str | None,
    until: str | None,
    entities: tuple[str, ...],
    key: str | None,
    who: str | None,
    claimed_by: str | None,
    operation: str | None,
    from_version: int | None,
    out: Path | None,
) -> None:
    """
    Write the audit trail to standard output or a file: one line of JSON for each row, by id.

    The export is complete if the exit status is 0 and the last line has "end": true; that line gives the number of
    rows. Otherwise it is truncated. All rows are from one snapshot, and memory use is constant. The trail has no password
    hashes: only whether one is set, and that it changed.

    To continue an export, give its next_version as --from-version: rows of transactions that were still open are in the
    next export. Some rows may come twice, with the same id. --since would miss rows that were written before TIME and
    committed later.
    """
    wanted = TrailFilter(
        since=_time("--since", since),
        until=_time("--until", until),
        entities=entities or None,
        key=key,
        who=who,
        claimed_by=claimed_by,
        operation=operation,
        from_version=from_version,
    )
    target = target_of(context)
    if out is None:
        end = _export(target, wanted, sys.stdout.buffer, "standard output")
    else:
        new_files(out)
        try:
            with replacing(out, 0o600) as file:
                end = _export(target, wanted, file, str(out))
        except OSError as error:
            raise InvalidInput(f"{error.filename or out}: {error.strerror}; nothing was exported") from error
    for name in end.absent:
        click.echo(f"authbackend: the trail has no row about a table {printable(name)}", err=True)


def _time(option: str, text: str | None) -> datetime | None:
    try:
        return parse_time(text) if text else None
    except ValueError:
        raise InvalidInput(f"{option} {text}: write it as 2027-01-31T12:00:00Z") from None


def _export(target: Target, wanted: TrailFilter, file: BinaryIO, name: str) -> TrailEnd:
    """
    Write the rows and the last line, which says that the export is complete.

    Raises:
        AuthbackendError: The database or the file failed before the end; the last line is then missing.
    """
    written = 0

    def write(line: bytes) -> None:
        nonlocal written
        try:
            file.write(line)
        except OSError as error:  # the file's, not the database's
            raise AuthbackendError(f"{name}: {error.strerror}") from error
        written += 1

    try:
        end = run(export_trail(target, wanted, write))
        write(json.dumps(_last_line(end, wanted), ensure_ascii=False).encode() + b"\n")
        file.flush()
    except OSError as error:
        raise AuthbackendError(f"{name}: {error.strerror}; the export is truncated") from error
    except AuthbackendError as error:
        error.detail = f"{error.detail}; the export is truncated after {written} rows"
        raise
    return end


def _last_line(end: TrailEnd, wanted: TrailFilter) -> dict[str, Any]:
    asked = {name: getattr(wanted, name) for name in TrailFilter.__slots__ if getattr(wanted, name) is not None}
    return {
        "end": True,
        "rows": end.rows,
        "last_id": end.last_id,
        "as_of": end.as_of.isoformat(),
        "next_version": end.next_version,
        "filter": {name: each.isoformat() if isinstance(each, datetime) else each for name, each in asked.items()},
    }
