"""
Makes all certificates of a bench set-up in one directory: two authorities, both servers, the broker's client
certificate, and devices.

There are two authorities on purpose. One signs the certificates of the broker's listeners and of devices; the
other signs those used between the broker and this service. So a device's certificate does not give access to
the endpoints that decide about devices.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from authbackend.pki.bench_ca import (
    Authority,
    Issued,
)
from authbackend.pki.files import write_file
from authbackend.pki.parsing import PKIError, normal_server_name, read_certificate, read_key, server_names

DEFAULT_BROKER_NAMES = ("localhost", "127.0.0.1", "::1", "rabbitmq")
SERVICE_NAMES = ("authbackend", "localhost", "127.0.0.1")
BROKER_CLIENT_NAME = "rabbitmq"
RESERVED_NAMES = frozenset({"ca", "internal-ca", "rabbitmq", "authbackend", "broker-client"})
RENEW_WITHIN = timedelta(days=30)
"""Rerunning the command that issued a certificate replaces it if it ends within this time."""

_COMMON_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    What happened to one pair NAME.pem and NAME.key.

    Attributes:
        name: The files' name without suffix.
        written: True if the pair was created now, False if an existing one was kept.
        note: Why, or a remark; may be empty.
        expires: End of validity, UTC.
    """

    name: str
    written: bool
    note: str
    expires: datetime


def device_name_fault(name: str) -> str | None:
    """
    Return why a certificate with this device name would be unusable or overwrite another file; None if the name
    is fine.
    """
    # Stricter than the registry's rule for common names (authbackend.policy.names), because these are also file
    # names.
    if not _COMMON_NAME.fullmatch(name):
        return (
            f"device name {name!r}: use only A-Z a-z 0-9 _ -, 1 to 64 characters. RabbitMQ gives some other "
            "characters a meaning (':' chooses a virtual host, ',' joins names, '.' and '/' separate levels)"
        )
    if name.lower() in RESERVED_NAMES:
        return f"device name {name!r} is the name of another file here; choose a different one"
    return None


def make_certificates(
    directory: Path, *, devices: Sequence[str] = (), servers: Sequence[str] | None = None
) -> Iterator[Outcome]:
    """
    Create what is missing in ``directory``, keep what exists, and report each pair as it is done.

    Existing authorities and device certificates are never replaced. Server certificates and the broker's client
    certificate are replaced if they no longer fit: other names were requested, another authority signed them, or
    they end within 30 days.

    Args:
        directory: Created if absent; private keys get mode 600.
        devices: Common names, one certificate each.
        servers: Names and addresses for the broker's listeners. None: those of the existing certificate, else
            localhost, 127.0.0.1, ::1 and rabbitmq.

    Raises:
        PKIError: A name cannot be used (nothing has been written yet), or an existing file cannot be read.
        OSError: The directory or a file cannot be written.
    """
    for fault in filter(None, map(device_name_fault, devices)):
        raise PKIError(fault)
    requested = None if servers is None else frozenset(map(normal_server_name, servers))
    directory.mkdir(parents=True, exist_ok=True)

    public, outcome = _authority(directory, "ca", "authbackend bench CA: devices and broker")
    yield outcome
    internal, outcome = _authority(directory, "internal-ca", "authbackend bench CA: broker to authbackend")
    yield outcome
    yield _server(directory, "rabbitmq", public, servers or DEFAULT_BROKER_NAMES, requested)
    yield _server(directory, "authbackend", internal, SERVICE_NAMES, frozenset(SERVICE_NAMES))
    yield _broker_client(directory, internal)
    for device in dict.fromkeys(devices):
        yield _device(directory, device, public)


def _authority(directory: Path, name: str, subject: str) -> tuple[Authority, Outcome]:
    existing = read_pair(directory, name)
    if existing is None:
        authority = Authority.create(subject)
        return authority, _write_pair(directory, name, Issued(authority.certificate_pem, authority.key_pem), "")
    try:
        authority = Authority.load(existing.certificate_pem, existing.key_pem)
    except PKIError as error:
        raise PKIError(f"{directory / name}.pem and .key: {error}. Move both away to get new ones") from error
    return authority, _kept(name, existing)


def _server(
    directory: Path, name: str, authority: Authority, names: Sequence[str], requested: frozenset[str] | None
) -> Outcome:
    existing = read_pair(directory, name)
    why = "" if existing is None else _stale(existing, authority)
    if existing is not None and not why:
        current = server_names(existing.certificate_pem)
        if requested is None or current == requested:
            return _kept(name, existing, f"for {', '.join(sorted(current))}")
        why = "remade, it was for other names"
    elif existing is not None and requested is None:
        names = sorted(server_names(existing.certificate_pem)) or names
    return _write_pair(directory, name, authority.issue_server(names), _join(why, f"for {', '.join(names)}"))


def _broker_client(directory: Path, authority: Authority) -> Outcome:
    name = "broker-client"
    existing = read_pair(directory, name)
    why = "" if existing is None else _stale(existing, authority)
    if existing is not None and not why:
        return _kept(name, existing)
    return _write_pair(directory, name, authority.issue_client(BROKER_CLIENT_NAME), why)


def _device(directory: Path, name: str, authority: Authority) -> Outcome:
    existing = read_pair(directory, name)
    if existing is None:
        return _write_pair(directory, name, authority.issue_client(name), "")
    why = _stale(existing, authority)
    return _kept(name, existing, f"unusable: {why[8:]}. Remove both files to get a new one" if why else "")


def _stale(pair: Issued, authority: Authority) -> str:
    """Return why this pair must be issued again ("remade, ..."), or an empty string."""
    if not authority.issued(pair.certificate_pem):
        return "remade, another authority signed it"
    if _expires(pair) - datetime.now(UTC) < RENEW_WITHIN:
        return f"remade, it ends on {_expires(pair):%Y-%m-%d}"
    return ""


def _kept(name: str, pair: Issued, note: str = "") -> Outcome:
    return Outcome(name, written=False, note=note, expires=_expires(pair))


def _expires(pair: Issued) -> datetime:
    return read_certificate(pair.certificate_pem).not_valid_after_utc


def _join(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def read_pair(directory: Path, name: str) -> Issued | None:
    """
    Return the contents of NAME.pem and NAME.key; None if neither exists.

    Raises:
        PKIError: One of them is missing or unreadable, or the key does not match the certificate.
    """
    certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
    if not certificate.exists() and not key.exists():
        return None
    for path, other in ((certificate, key), (key, certificate)):
        if not path.exists():
            raise PKIError(f"{path} is missing, but {other} is there: put it back, or move {other} away")
    pair = Issued(certificate.read_bytes(), key.read_bytes())
    try:
        fits = read_certificate(pair.certificate_pem).public_key() == read_key(pair.key_pem).public_key()
    except PKIError as error:
        raise PKIError(f"{certificate} and {key}: {error}. Move both away to get new ones") from error
    if not fits:
        raise PKIError(f"{key} is not the key of {certificate}: move both away to get new ones")
    return pair


def _write_pair(directory: Path, name: str, pair: Issued, note: str) -> Outcome:
    write_file(directory / f"{name}.key", pair.key_pem, 0o600)
    write_file(directory / f"{name}.pem", pair.certificate_pem, 0o644)
    return Outcome(name, written=True, note=note, expires=_expires(pair))
