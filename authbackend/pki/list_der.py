"""
Splits and assembles revocation lists in DER (RFC 5280 5.1).

``cryptography`` rejects a whole list because of one entry with a negative serial number. Authorities have issued such
certificates, and RabbitMQ accepts them, so it must be possible to list them. Only the entries are parsed here;
``cryptography`` parses everything else, from a copy of the list without entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509

from authbackend.pki import der

CRL_REASON = bytes.fromhex("551d15")
INVALIDITY_DATE = bytes.fromhex("551d18")

_BOOLEAN, _INTEGER, _BIT_STRING, _OCTET_STRING, _OID, _ENUMERATED, _SEQUENCE = 0x01, 0x02, 0x03, 0x04, 0x06, 0x0A, 0x30
_TIMES = (0x17, 0x18)


@dataclass(frozen=True, slots=True)
class ListParts:
    """
    A revocation list split into its parts.

    Attributes:
        signed: The bytes that the signature covers.
        empty: The same list without its entries, so its signature does not verify.
        entries: The content of revokedCertificates; empty if absent.
    """

    signed: bytes
    signature: bytes
    empty: x509.CertificateRevocationList
    entries: bytes


@dataclass(frozen=True, slots=True)
class RawEntry:
    """
    An entry as encoded on a list.

    Attributes:
        extensions: For each, the content of its object identifier, whether it is critical, and its value.
    """

    serial: int
    revoked_at: datetime
    extensions: tuple[tuple[bytes, bool, bytes], ...]


def take_apart(content: bytes) -> ListParts:
    """
    Split a list (DER) into its parts.

    Raises:
        ValueError: Not a revocation list.
        OverflowError, cryptography.x509.InvalidVersion: Raised by ``cryptography``.
    """
    tag, outer, rest = der.element(content)
    if tag != _SEQUENCE or rest:
        raise ValueError("not one DER sequence")
    body, algorithm, (signature_tag, signature) = der.elements(outer)
    after_body = len(der.element(outer)[2])
    fields, at = _fields(body[1])
    entries = b""
    if at < len(fields) and fields[at][0] == _SEQUENCE:
        entries = fields.pop(at)[1]
    if signature_tag != _BIT_STRING or signature[:1] != b"\0":
        raise ValueError("its signature is not a whole number of octets")
    if algorithm not in fields[:2]:
        raise ValueError("its inner and outer signature algorithms differ")
    empty = _join(fields, algorithm, signature)
    return ListParts(outer[: len(outer) - after_body], signature[1:], x509.load_der_x509_crl(empty), entries)


def put_together(empty: bytes, entries: bytes, sign: Callable[[bytes], bytes]) -> bytes:
    """
    Return a list with entries, as DER.

    Args:
        empty: A signed list without entries.
        entries: One or more encoded entries, concatenated.
        sign: Signs with the same key and algorithm as ``empty``.
    """
    body, algorithm, _ = der.elements(der.element(empty)[1])
    fields, at = _fields(body[1])
    fields.insert(at, (_SEQUENCE, entries))
    signature = sign(der.encode(_SEQUENCE, b"".join(der.encode(*field) for field in fields)))
    return _join(fields, algorithm, b"\0" + signature)


def _fields(body: bytes) -> tuple[list[tuple[int, bytes]], int]:
    """Return the fields of a list, and the index where its entries are or would be: after its times."""
    fields = list(der.elements(body))
    at = next((number for number, (tag, _) in enumerate(fields) if tag in _TIMES), len(fields))
    while at < len(fields) and fields[at][0] in _TIMES:
        at += 1
    return fields, at


def _join(fields: list[tuple[int, bytes]], algorithm: tuple[int, bytes], signature: bytes) -> bytes:
    body = der.encode(_SEQUENCE, b"".join(der.encode(*field) for field in fields))
    return der.encode(_SEQUENCE, body + der.encode(*algorithm) + der.encode(_BIT_STRING, signature))


def encode_entry(serial: int, revoked_at: datetime, reason: int) -> bytes:
    """
    Return an entry as DER.

    Args:
        reason: CRLReason (RFC 5280 5.3.1). 0, unspecified, is left out, as the RFC recommends.
    """
    content = der.encode(_INTEGER, der.integer(serial)) + der.encode_time(revoked_at)
    if reason:
        value = der.encode(_OCTET_STRING, der.encode(_ENUMERATED, bytes([reason])))
        extension = der.encode(_SEQUENCE, der.encode(_OID, CRL_REASON) + value)
        content += der.encode(_SEQUENCE, extension)
    return der.encode(_SEQUENCE, content)


def entries_in(entries: bytes) -> Iterator[RawEntry]:
    """
    Yield the entries of a list.

    Raises:
        ValueError: One cannot be parsed.
    """
    for tag, content in der.elements(entries):
        (serial_tag, serial), (time_tag, moment), *more = der.elements(content)
        if (tag, serial_tag) != (_SEQUENCE, _INTEGER) or time_tag not in _TIMES or not serial or len(more) > 1:
            raise ValueError("an entry does not begin with a serial number and a time")
        extensions = tuple(_extension(*one) for one in der.elements(more[0][1])) if more else ()
        yield RawEntry(int.from_bytes(serial, "big", signed=True), der.time(moment.decode("ascii")), extensions)


def _extension(tag: int, content: bytes) -> tuple[bytes, bool, bytes]:
    (oid_tag, oid), *between, (value_tag, value) = der.elements(content)
    if (tag, oid_tag, value_tag) != (_SEQUENCE, _OID, _OCTET_STRING) or [one[0] for one in between] not in (
        [],
        [_BOOLEAN],
    ):
        raise ValueError("an entry has a malformed extension")
    return oid, any(any(one[1]) for one in between), value


def reason_in(value: bytes) -> int:
    """
    Return the number in a CRLReason.

    Raises:
        ValueError: Not a CRLReason.
    """
    tag, content, rest = der.element(value)
    if tag != _ENUMERATED or len(content) != 1 or rest:
        raise ValueError("a reason is not a one-byte ENUMERATED")
    return content[0]
