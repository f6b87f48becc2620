"""Import of certificates in constant memory, and of revocations from the database of ``openssl ca``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from authbackend.cli.authorities import read_input
from authbackend.cli.common import printable
from authbackend.pki.bundle import blocks, read_record
from authbackend.pki.crl import HOLD
from authbackend.pki.openssl_index import index_of
from authbackend.pki.parsing import PKIError, read_certificate
from authbackend.postgres import certificates as store
from authbackend.postgres.certificates import CertificateRow
from authbackend.postgres.connection import Connection, Target, connected, name_actor

BATCH = 2000
_SHOWN = 20
_PROGRESS_S = 2.0
_SUFFIXES = {".pem", ".crt", ".cer", ".der"}


@dataclass(slots=True)
class Report:
    """The result of an import. Of names and faults, only the first 20 are kept."""

    new: int = 0
    present: int = 0
    authorities: int = 0
    keys: int = 0
    unknown: int = 0
    unknown_names: list[str] = field(default_factory=list)
    linked: int = 0
    faults: int = 0
    fault_texts: list[str] = field(default_factory=list)
    revoked: int = 0
    revoked_unknown: int = 0

    def fault(self, text: str) -> None:
        """Count something that was not imported, and keep why."""
        self.faults += 1
        if len(self.fault_texts) < _SHOWN:
            self.fault_texts.append(text)

    def result(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}

    def lines(self) -> Iterator[str]:
        """Yield the result as lines for people."""
        yield f"{self.new} new, {self.present} already on record, {self.authorities} of authorities skipped"
        if self.keys:
            yield f"{self.keys} private keys were not read"
        if self.unknown:
            names = ", ".join(map(printable, self.unknown_names))
            yield f"{self.unknown} belong to no registered device: {names}{' ...' if self.unknown > _SHOWN else ''}"
        if self.linked:
            yield f"{self.linked} now belong to devices that were registered since"
        if self.revoked or self.revoked_unknown:
            yield f"{self.revoked} revoked; {self.revoked_unknown} more are revoked in the index, but not on record"
        yield from (f"not imported: {text}" for text in self.fault_texts)
        if self.faults > _SHOWN:
            yield f"and {self.faults - _SHOWN} more not imported"


async def import_paths(target: Target, actor: str, paths: Iterable[Path], report: Report) -> None:
    """
    Import certificates in batches, each in its own transaction; progress goes to standard error.

    Raises:
        AuthbackendError: The database refuses a batch or goes away; earlier batches are imported.
    """
    reported_at = time.monotonic()
    async with connected(target) as connection:
        batch: list[CertificateRow] = []
        for row in _rows(paths, report):
            batch.append(row)
            if len(batch) == BATCH:
                await _insert(connection, actor, batch, report)
                batch = []
                if time.monotonic() - reported_at >= _PROGRESS_S:
                    reported_at = time.monotonic()
                    click.echo(f"authbackend: {report.new + report.present} certificates so far", err=True)
        if batch:
            await _insert(connection, actor, batch, report)


async def _insert(connection: Connection, actor: str, rows: list[CertificateRow], report: Report) -> None:
    async with connection.transaction():
        await name_actor(connection, actor)
        inserted = await store.insert_certificates(connection, rows)
        report.linked += await store.link_devices(connection, [row.fingerprint for row in rows])
    report.new += len(inserted.new)
    report.present += inserted.present
    report.unknown += len(inserted.unknown)
    report.unknown_names += inserted.unknown[: _SHOWN - len(report.unknown_names)]
    for serial in inserted.collided:
        report.fault(f"serial number {serial}: another certificate of its issuer, which is on record, has the same")


def _rows(paths: Iterable[Path], report: Report) -> Iterator[CertificateRow]:
    for path in paths:
        if str(path) == "-":
            yield from _stream("standard input", sys.stdin.buffer, report)
        elif path.is_dir():
            for file in _files(path, report):
                yield from _file(file, report)
        else:
            yield from _file(path, report)


def _files(folder: Path, report: Report) -> Iterator[Path]:
    """Yield the files in a folder that may hold certificates, and report everything else in it."""
    unreadable: list[OSError] = []
    for parent, folders, names in os.walk(folder, onerror=unreadable.append):
        folders.sort()
        for name in sorted(names):
            file = Path(parent, name)
            if file.suffix.lower() == ".key":
                report.keys += 1
            elif file.suffix.lower() not in _SUFFIXES:
                report.fault(f"{file}: not named {', '.join(sorted(f'*{suffix}' for suffix in _SUFFIXES))}")
            elif file.exists() and not file.is_file():
                report.fault(f"{file}: not a file")
            else:
                yield file
        for name in folders:
            if (link := Path(parent, name)).is_symlink():
                report.fault(f"{link}: a link to a folder; name the folder itself")
    for error in unreadable:
        report.fault(f"{error.filename}: {error.strerror}")


def _file(path: Path, report: Report) -> Iterator[CertificateRow]:
    try:
        with path.open("rb") as lines:
            yield from _stream(str(path), lines, report)
    except OSError as error:
        report.fault(f"{path}: {error.strerror}")


def _stream(name: str, lines: Iterable[bytes], report: Report) -> Iterator[CertificateRow]:
    number = 0
    before = report.faults
    for block in blocks(lines):
        if block.fault is not None:
            report.fault(f"{name}:{block.line}: {block.fault}")
        elif block.der is None:
            report.keys += 1
        else:
            number += 1
            try:
                certificate, is_authority = read_record(block.der)
            except PKIError as error:
                report.fault(f"{name}:{block.line}: certificate {number}: {error.detail}")
                continue
            if is_authority:
                report.authorities += 1
                continue
            yield CertificateRow(
                certificate.fingerprint,
                certificate.serial,
                certificate.issuer,
                certificate.subject,
                certificate.common_name,
                certificate.not_before,
                certificate.not_after,
                key_fingerprint=certificate.key_fingerprint,
            )
    if number == 0 and report.faults == before:
        report.fault(f"{name}: no certificate in it")


async def import_index(target: Target, actor: str, index: Path, issuer: Path, report: Report) -> None:
    """
    Revoke the certificates that the database of ``openssl ca`` says are revoked.

    Raises:
        InvalidInput: A file cannot be read or is not such a database; nothing was changed.
    """
    text = read_input(index).decode("utf-8-sig", "replace")
    entries = list(index_of(text, str(index)))
    revoked = [entry for _, entry in entries if entry is not None]
    for entry in revoked:
        if entry.reason == HOLD:
            report.fault(
                f"serial number {entry.serial} is on hold: it stays active, because a revocation is final here"
            )
    try:
        subject = read_certificate(read_input(issuer)).subject.rfc4514_string()
    except PKIError as error:
        raise PKIError(f"{issuer}: {error.detail}") from error
    serials = {serial for serial, _ in entries}
    async with connected(target) as connection, connection.transaction():
        await name_actor(connection, actor)
        listed = [(entry.serial, entry.reason, entry.revoked_at) for entry in revoked if entry.reason != HOLD]
        report.revoked, report.revoked_unknown = await store.revoke_listed(connection, subject, listed)
        if not await store.count_on_record(connection, subject, serials):
            report.fault(
                f"{index}: none of its {len(serials)} certificates is on record as issued by {subject!r}: name the right authority with --issuer, or import the certificates first"
            )
