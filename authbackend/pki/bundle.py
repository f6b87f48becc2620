"""Reads certificates from the field: PEM bundles of any length, DER, and what ``cryptography`` rejects."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cryptography import x509
from cryptography.x509.oid import NameOID

from authbackend.pki import der
from authbackend.pki.parsing import PKIError, Record, key_fingerprint, recordable

_LONGEST_BYTES = 65536
_BOUNDARY = re.compile(rb"-----(BEGIN|END) ([A-Z0-9 ]+)-----")
_CERTIFICATE = (b"CERTIFICATE", b"X509 CERTIFICATE")
_NO_CERTIFICATES = (b"PRIVATE KEY", b"PUBLIC KEY", b"PARAMETERS")
_INSTEAD = {
    "TRUSTED CERTIFICATE": "this is OpenSSL's own format; convert it to a certificate: openssl x509 -in FILE",
    "PKCS7": "unpack it: openssl pkcs7 -print_certs -in FILE",
    "CMS": "unpack it: openssl pkcs7 -print_certs -in FILE",
    "X509 CRL": "this is a revocation list; use: authbackend crl import",
    "CERTIFICATE REQUEST": "this is a certificate request; use: authbackend device enroll",
}
_BASIC_CONSTRAINTS = bytes.fromhex("551d13")
_TEXT = {0x0C: "utf-8", 0x1C: "utf-32-be", 0x1E: "utf-16-be"}


@dataclass(frozen=True, slots=True)
class Block:
    """
    One PEM block of a bundle, or the certificate of a DER file.

    Attributes:
        line: Line it begins on, from 1.
        der: The certificate; None if the block holds none.
        fault: Why it is not a certificate. Both None: a key or parameters, which may stand next to a certificate.
    """

    line: int
    der: bytes | None
    fault: str | None = None


def blocks(lines: Iterable[bytes]) -> Iterator[Block]:
    """Yield each PEM block, or the one certificate of a DER file. Text outside PEM blocks is ignored."""
    lines = iter(lines)
    first = next(lines, b"")
    if first[:1] == b"\x30" and len(first) > 1 and first[1] >= 0x80:
        yield _whole(first, lines)
        return
    if first[:2] in (b"\xff\xfe", b"\xfe\xff"):
        yield Block(1, None, "this is UTF-16; save the file as UTF-8 or ASCII")
        return
    label, too_long, begin, content, size = b"", b"", 0, [], 0
    for number, line in enumerate(_again(first, lines), 1):
        rest = 0
        for boundary in _BOUNDARY.finditer(line):
            kind, name = boundary.groups()
            if label:
                content.append(line[rest : boundary.start()])
                same = kind == b"END" and name == label
                yield _block(begin, label, content) if same else _cut_off(begin, label, number)
            elif kind == b"END" and name != too_long:
                yield Block(number, None, f"{name.decode()} has an END line without a BEGIN line")
            label, too_long, begin, content, size = (name if kind == b"BEGIN" else b""), b"", number, [], 0
            rest = boundary.end()
        if label:
            content.append(line[rest:])
            size += len(line) - rest
            if size > _LONGEST_BYTES:
                yield Block(begin, None, f"{label.decode()} is longer than 64 KiB")
                label, too_long = b"", label
    if label:
        yield _cut_off(begin, label, None)


def _again(first: bytes, lines: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from lines


def _whole(first: bytes, lines: Iterator[bytes]) -> Block:
    content = bytearray(first)
    for line in lines:
        content += line
        if len(content) > _LONGEST_BYTES:
            return Block(1, None, "DER of more than 64 KiB: not a certificate")
    return Block(1, bytes(content))


def _cut_off(begin: int, label: bytes, line: int | None) -> Block:
    where = "the file ends" if line is None else f"line {line} begins or ends another block"
    return Block(begin, None, f"{label.decode()} has no END line: {where}")


def _block(begin: int, label: bytes, content: list[bytes]) -> Block:
    if label.endswith(_NO_CERTIFICATES):
        return Block(begin, None)
    if label not in _CERTIFICATE:
        name = label.decode()
        return Block(begin, None, f"{name}: {_INSTEAD.get(name, 'not a certificate')}")
    try:
        return Block(begin, base64.b64decode(b"".join(b"".join(content).split()), validate=True))
    except binascii.Error:
        return Block(begin, None, "the certificate is not valid base64")


def read_record(certificate: bytes) -> tuple[Record, bool]:
    """
    Return the record of a certificate (DER), and whether its basic constraints say CA.

    Nothing else is parsed: brokers accept certificates with extensions or strings that ``cryptography`` rejects, and
    those must be on record so that they can be revoked.

    Raises:
        PKIError: Not a certificate, or one that cannot be stored.
    """
    try:
        tag, outer, rest = der.element(certificate)
        if tag != 0x30 or rest:
            raise ValueError("not one DER sequence")
        fields = list(der.elements(next(der.elements(outer))[1]))
        if fields[0][0] == 0xA0:
            version = int.from_bytes(der.element(fields.pop(0)[1])[1], "big") + 1
            if version > 3:
                raise PKIError(f"X.509 version {version} is not supported")
        (_, serial), _, (_, issuer), (_, validity), (_, subject) = fields[:5]
        begin, end = (der.time(moment.decode("ascii")) for _, moment in der.elements(validity))
        extensions = next((content for tag, content in fields[6:] if tag == 0xA3), None)
        is_authority = extensions is not None and _says_ca(extensions)
        names = _name(subject)
        common_names = [str(one.value) for one in names.get_attributes_for_oid(NameOID.COMMON_NAME)]
        number = int.from_bytes(serial, "big", signed=True)
        record = Record(
            hashlib.sha256(certificate).hexdigest(),
            f"{number:x}",
            _name(issuer).rfc4514_string(),
            names.rfc4514_string(),
            ",".join(common_names),
            begin,
            end,
            key_fingerprint(der.encode(*fields[5])),
        )
    except (ValueError, IndexError, StopIteration, TypeError) as error:
        raise PKIError(f"the certificate cannot be read: {error or type(error).__name__}") from error
    return recordable(record), is_authority


def _name(content: bytes) -> x509.Name:
    """Return a name; unknown string types and invalid characters are decoded byte by byte, as Erlang does."""
    try:
        return x509.Name([x509.RelativeDistinguishedName(_attributes(rdn)) for _, rdn in der.elements(content)])
    except UnicodeDecodeError as error:
        raise ValueError("a name is not valid text") from error


def _attributes(rdn: bytes) -> Iterator[x509.NameAttribute[str]]:
    for _, attribute in der.elements(rdn):
        (_, oid), (tag, value) = der.elements(attribute)
        text = value.decode(_TEXT.get(tag, "latin-1"))
        yield x509.NameAttribute(x509.ObjectIdentifier(der.dotted(oid)), text, _validate=False)


def _says_ca(extensions: bytes) -> bool:
    for _, extension in der.elements(der.element(extensions)[1]):
        parts = list(der.elements(extension))
        if parts[0][1] == _BASIC_CONSTRAINTS:
            constraints = list(der.elements(der.element(parts[-1][1])[1]))
            return bool(constraints) and constraints[0][0] == 0x01 and any(constraints[0][1])
    return False
