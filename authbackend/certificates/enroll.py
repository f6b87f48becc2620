"""
Issues certificates for devices: registers the devices, signs, and records the certificates, all in one transaction.

A certificate must be on record before anybody gets it, so hand out what is returned here only after the commit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from authbackend.certificates.crl_publisher import save_authority
from authbackend.errors import Conflict, InvalidInput
from authbackend.pki import signing
from authbackend.pki.ca import AuthorityFolder, Signed
from authbackend.pki.parsing import PKIError, PublicKey, new_key, read_request
from authbackend.pki.profiles import Profile
from authbackend.postgres import certificates as store
from authbackend.postgres.certificates import CertificateRow
from authbackend.postgres.connection import Connection, database_time

MOST_AT_ONCE = 100_000
_SHOWN_FAULTS = 20
_DNS_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")


@dataclass(frozen=True, slots=True)
class Request:
    """
    A request for a device's certificate.

    Args:
        device_type: The type to register the device with if it does not exist; None: it must exist.
        common_name: The common name to register the device with; None: its id.
        request_pem: PKCS #10; None: a key is generated here.
        where: Prefix of messages, for example the line of a file.
    """

    device_id: str
    device_type: str | None = None
    common_name: str | None = None
    request_pem: bytes | None = None
    where: str = ""


@dataclass(frozen=True, slots=True)
class Enrolled:
    """
    A certificate that is on record once the transaction is committed.

    Args:
        key_pem: Not encrypted; None if the device generated its own key.
    """

    device_id: str
    signed: Signed
    key_pem: bytes | None


async def enroll(
    connection: Connection, authority: AuthorityFolder, profile: Profile, requests: Sequence[Request]
) -> list[Enrolled]:
    """
    Register devices if requested, sign and record their certificates, all in the caller's transaction.

    Raises:
        InvalidInput: Requests cannot be signed; the message names each (at most 20) and why.
        Conflict: A device exists with another type or common name.
        PKIError: The authority is not valid, by the database's time.
    """
    if len(requests) > MOST_AT_ONCE:
        raise InvalidInput(f"{len(requests)} devices are too many for one call; the limit is {MOST_AT_ONCE}")
    await save_authority(connection, authority)
    if any(request.device_type is not None for request in requests):
        await _register(connection, requests)
    rows = await connection.fetch(
        "select device_id, common_name, type, status from device where device_id = any ($1::text[]) for key share",
        [request.device_id for request in requests],
    )
    devices = {row["device_id"]: dict(row) for row in rows}
    enrolled, faults = [], []
    now = await database_time(connection)
    for request in requests:
        try:
            enrolled.append(_sign(authority, profile, request, devices.get(request.device_id), now))
        except InvalidInput as error:
            faults.append(f"{request.where}{error.detail}")
    if faults:
        more = len(faults) - _SHOWN_FAULTS
        raise InvalidInput("\n".join(faults[:_SHOWN_FAULTS]) + (f"\nand {more} more" if more > 0 else ""))
    await record(connection, [(one.signed, one.device_id) for one in enrolled])
    return enrolled


async def _register(connection: Connection, requests: Sequence[Request]) -> None:
    new = [request for request in requests if request.device_type is not None]
    await connection.execute(
        "insert into device (device_id, common_name, type) select * from unnest($1::text[], $2::text[], $3::text[]) on conflict (device_id) do nothing",
        [request.device_id for request in new],
        [request.common_name or request.device_id for request in new],
        [request.device_type for request in new],
    )


def _sign(
    authority: AuthorityFolder,
    profile: Profile,
    request: Request,
    device: Mapping[str, str] | None,
    now: datetime,
) -> Enrolled:
    name = request.device_id
    if device is None:
        raise PKIError(f"no device has the id {name!r}; register it, or give its type (--type)")
    if request.device_type is not None and device["type"] != request.device_type:
        raise PKIError(f"device {name} exists, with the type {device['type']}")
    if request.common_name is not None and device["common_name"] != request.common_name:
        raise PKIError(f"device {name} exists, with the common name {device['common_name']!r}")
    if device["status"] == "revoked":
        raise PKIError(f"device {name} is revoked; to let it in again: authbackend device reinstate {name}")
    common_name = device["common_name"]
    if request.request_pem is None:
        key = new_key(profile.key)
        return Enrolled(name, _signed(authority, common_name, key.public_key(), profile, now), signing.key_pem(key))
    try:
        requested, public_key = read_request(request.request_pem)
    except PKIError as error:
        raise PKIError(f"device {name}: {error.detail}") from error
    if requested != common_name:
        raise PKIError(
            f"device {name}: the request is for the common name {requested!r}, the device's is {common_name!r}"
        )
    return Enrolled(name, _signed(authority, common_name, public_key, profile, now), None)


def _signed(authority: AuthorityFolder, common_name: str, key: PublicKey, profile: Profile, now: datetime) -> Signed:
    names = [common_name] if _DNS_NAME.fullmatch(common_name) else []
    return authority.sign(common_name, key, profile, names, now=now)


async def record(connection: Connection, signed: Sequence[tuple[Signed, str | None]]) -> None:
    """
    Record newly signed certificates.

    Args:
        signed: Each with its device's id; None for other clients and servers.
    Raises:
        InvalidInput: A certificate with the same key was revoked as compromised.
        Conflict: The authority has already used one of the serial numbers.
    """
    keys = {one.record.key_fingerprint: one.record.common_name for one, _ in signed if one.record.key_fingerprint}
    if refused := await store.compromised_keys(connection, list(keys)):
        names = ", ".join(sorted(repr(keys[key]) for key in refused)[:_SHOWN_FAULTS])
        raise InvalidInput(f"{names}: its key was revoked as compromised (keyCompromise); make a new key")
    rows = [
        CertificateRow(
            one.record.fingerprint,
            one.record.serial,
            one.record.issuer,
            one.record.subject,
            one.record.common_name,
            one.record.not_before,
            one.record.not_after,
            device_id,
            key_fingerprint=one.record.key_fingerprint,
        )
        for one, device_id in signed
    ]
    inserted = await store.insert_certificates(connection, rows)
    if len(inserted.new) != len(rows):
        raise Conflict("a serial number is on record already for another certificate of this authority; try again")
