"""
The certificates of a whole bench set-up in one directory: both authorities, both servers, the broker's
login, devices.

Two authorities on purpose. One signs the broker's listeners and the devices; the other signs the channel
between the broker and this service. A device's certificate is therefore no key to the endpoints that decide
about devices.
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
"""A certificate that ends so soon is replaced where somebody runs the command that made it again."""

_COMMON_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    What became of one pair NAME.pem and NAME.key.

    Attributes:
        name: the files' name without suffix.
        written: whether the pair was made now; otherwise it was there and was kept.
        note: why, or what to know about it; empty if there is nothing to say.
        expires: last moment of validity, UTC.
    """

    name: str
    written: bool
    note: str
    expires: datetime


def device_name_fault(name: str) -> str | None:
    """
    Say why a certificate for this device would be of no use or would overwrite another file; None if it is
    fine.
    """
    # The registry's own, wider rule for common names is in authbackend.policy.names; these are also file
    # names.
    if not _COMMON_NAME.fullmatch(name):
        return (
            f"device name {name!r}: use 1 to 64 of A-Z a-z 0-9 _ - only. RabbitMQ gives some of the other "
            "characters a meaning (':' chooses a virtual host, ',' joins names, '.' and '/' separate levels)"
        )
    if name.lower() in RESERVED_NAMES:
        return f"device name {name!r} is the name of one of the other files here; choose another"
    return None


def make_certificates(
    directory: Path, *, devices: Sequence[str] = (), servers: Sequence[str] | None = None
) -> Iterator[Outcome]:
    """
    Make what is missing in ``directory``, keep what is there, and report each pair as it is done.

    Existing devices' certificates and authorities are never replaced. A server's certificate, and the
    broker's login, are replaced when they could not serve: other names were asked for, another authority
    signed them, or they end within 30 days.

    Args:
        directory: made if absent; private keys get mode 600.
        devices: common names, one certificate each.
        servers: names and addresses for the broker's listeners. None: those of the existing certificate, else
            localhost, 127.0.0.1, ::1 and rabbitmq.

    Raises:
        PKIError: a name that cannot be used (before anything is written), or a file there that cannot be
        read.
        OSError: the directory or a file cannot be written.
    """
    for fault in filter(None, map(device_name_fault, devices)):
        raise PKIError(fault)
    wanted = None if servers is None else frozenset(map(normal_server_name, servers))
    directory.mkdir(parents=True, exist_ok=True)

    public, outcome = _authority(directory, "ca", "authbackend bench CA: devices and broker")
    yield outcome
    internal, outcome = _authority(directory, "internal-ca", "authbackend bench CA: broker to authbackend")
    yield outcome
    yield _server(directory, "rabbitmq", public, servers or DEFAULT_BROKER_NAMES, wanted)
    yield _server(directory, "authbackend", internal, SERVICE_NAMES, frozenset(SERVICE_NAMES))
    yield _broker_client(directory, internal)
    for device in dict.fromkeys(devices):
        yield _device(directory, device, public)


def _authority(directory: Path, name: str, subject: str) -> tuple[Authority, Outcome]:
    present = read_pair(directory, name)
    if present is None:
        authority = Authority.create(subject)
        return authority, _write_pair(directory, name, Issued(authority.certificate_pem, authority.key_pem), "")
    try:
        authority = Authority.load(present.certificate_pem, present.key_pem)
    except PKIError as error:
        raise PKIError(f"{directory / name}.pem and .key: {error}. Move both away to have new ones made") from error
    return authority, _kept(name, present)


def _server(
    directory: Path, name: str, authority: Authority, names: Sequence[str], wanted: frozenset[str] | None
) -> Outcome:
    present = read_pair(directory, name)
    why = "" if present is None else _stale(present, authority)
    if present is not None and not why:
        has = server_names(present.certificate_pem)
        if wanted is None or has == wanted:
            return _kept(name, present, f"for {', '.join(sorted(has))}")
        why = "remade, it was for other names"
    elif present is not None and wanted is None:
        names = sorted(server_names(present.certificate_pem)) or names
    return _write_pair(directory, name, authority.issue_server(names), _join(why, f"for {', '.join(names)}"))


def _broker_client(directory: Path, authority: Authority) -> Outcome:
    name = "broker-client"
    present = read_pair(directory, name)
    why = "" if present is None else _stale(present, authority)
    if present is not None and not why:
        return _kept(name, present)
    return _write_pair(directory, name, authority.issue_client(BROKER_CLIENT_NAME), why)


def _device(directory: Path, name: str, authority: Authority) -> Outcome:
    present = read_pair(directory, name)
    if present is None:
        return _write_pair(directory, name, authority.issue_client(name), "")
    why = _stale(present, authority)
    return _kept(name, present, f"of no use: {why[8:]}. Remove both files for a new one" if why else "")


def _stale(pair: Issued, authority: Authority) -> str:
    """Why this pair has to be made again ("remade, ..."), or the empty text."""
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
    Return what is in NAME.pem and NAME.key, None if neither is there.

    Raises:
        PKIError: One of them is missing or cannot be read, or they do not belong together.
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
        raise PKIError(f"{certificate} and {key}: {error}. Move both away to have new ones made") from error
    if not fits:
        raise PKIError(f"{key} is not the key of {certificate}: move both away to have new ones made")
    return pair


def _write_pair(directory: Path, name: str, pair: Issued, note: str) -> Outcome:
    write_file(directory / f"{name}.key", pair.key_pem, 0o600)
    write_file(directory / f"{name}.pem", pair.certificate_pem, 0o644)
    return Outcome(name, written=True, note=note, expires=_expires(pair))
