"""Certificate revocation lists (RFC 5280 5): signing, checking, and the file name that OpenSSL and Erlang look for."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import ExtensionOID

from authbackend.pki import list_der
from authbackend.pki.der import dotted, element, elements, encode
from authbackend.pki.list_der import ListParts, RawEntry
from authbackend.pki.parsing import LIBRARY_FAULTS, PKIError, PrivateKey, PublicKey, is_authority, plain, serial_is_kept

REASONS = {
    "unspecified": 0,
    "keyCompromise": 1,
    "cACompromise": 2,
    "affiliationChanged": 3,
    "superseded": 4,
    "cessationOfOperation": 5,
    "certificateHold": 6,
    "privilegeWithdrawn": 9,
    "aACompromise": 10,
}
"""Stored reasons and their numbers in RFC 5280 5.3.1; any other text is listed as unspecified."""

HOLD = "certificateHold"
"""The only reason that can be lifted; never stored, and in effect only while an outside authority's list has it."""

CLOCK_SKEW = timedelta(minutes=5)
_NO_LIST = "it is not a readable certificate revocation list, neither DER nor PEM"
_UNDERSTOOD = {ExtensionOID.CRL_NUMBER, ExtensionOID.AUTHORITY_KEY_IDENTIFIER}
_UNDERSTOOD_OF_ENTRIES = {list_der.CRL_REASON, list_der.INVALIDITY_DATE}
_REASON_NAMES = {number: name for name, number in REASONS.items()}
_PEM = re.compile(rb"-----BEGIN X509 CRL-----(.*?)-----END X509 CRL-----", re.DOTALL)
_PEM_COLUMNS = 64
_LARGEST_NUMBER = 2**159
_STRINGS = {0x0C: "utf-8", 0x13: "latin-1", 0x14: "latin-1", 0x16: "latin-1", 0x1A: "latin-1"}
_WIDE_STRINGS = {0x1C: "utf-32-be", 0x1E: "utf-16-be"}
_SPACES = " \t\n\v\f\r"


@dataclass(frozen=True, slots=True)
class CrlEntry:
    """
    A revoked certificate on a list.

    Attributes:
        serial: Lower-case hexadecimal digits, with a minus sign if negative, as in the table ``certificate``.
        reason: A reason name from RFC 5280, or any other text, which is listed without a reason; empty for none.
    """

    serial: str
    reason: str
    revoked_at: datetime


@dataclass(frozen=True, slots=True)
class RevocationList:
    """
    A signed revocation list.

    Attributes:
        issuer: The authority's subject, RFC 4514.
        number: Its CRL number (RFC 5280 5.2.3).
        der: The list itself.
    """

    issuer: str
    number: int
    this_update: datetime
    next_update: datetime
    der: bytes


def sign_list(
    entries: Sequence[CrlEntry],
    *,
    issuer: x509.Certificate,
    key: PrivateKey,
    number: int,
    now: datetime,
    lifetime: timedelta,
) -> RevocationList:
    """
    Sign a revocation list. Takes about 10 microseconds per entry.

    Args:
        number: Its CRL number, greater than the previous list's.
        now: Its thisUpdate; nextUpdate is ``lifetime`` later.
    """
    now = now.replace(microsecond=0)
    empty = (
        x509.CertificateRevocationListBuilder(issuer.subject)
        .last_update(now)
        .next_update(now + lifetime)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .add_extension(x509.CRLNumber(number), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.DER)
    )
    listed = b"".join(_encoded(entry, now) for entry in entries)
    whole = list_der.put_together(empty, listed, lambda body: _signature(key, body)) if listed else empty
    return RevocationList(issuer.subject.rfc4514_string(), number, now, now + lifetime, whole)


def _signature(key: PrivateKey, body: bytes) -> bytes:
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(body, ec.ECDSA(hashes.SHA256()))
    return key.sign(body, padding.PKCS1v15(), hashes.SHA256())


def _encoded(entry: CrlEntry, now: datetime) -> bytes:
    moment = min(entry.revoked_at, now).astimezone(UTC)
    return list_der.encode_entry(int(entry.serial, 16), moment, REASONS.get(entry.reason, 0))


def read_list(
    content: bytes, authorities: Iterable[x509.Certificate], distribution_point: str | None = None
) -> tuple[RevocationList, x509.Certificate]:
    """
    Parse a list, DER or PEM, and return it with the authority that signed it.

    A list without a CRL number (RFC 5280 requires one, OpenSSL can omit it) gets its thisUpdate in seconds instead.

    Args:
        authorities: The authorities that may have signed it.
        distribution_point: The URL that every certificate of the authority names. A list that names a distribution
            point is accepted only if it is this one: Erlang refuses every certificate that does not name the same.
    Raises:
        PKIError: Not a list, signed by none of the authorities, not covering all device certificates, or of a kind that
            RabbitMQ and this service do not support: a delta or indirect list, or one without nextUpdate.
    """
    der = _der(content)
    parts = _parse(der)
    parsed = parts.empty
    authority = _signer(parts, authorities)
    for extension in parsed.extensions:
        if extension.oid == ExtensionOID.DELTA_CRL_INDICATOR:
            raise PKIError("it is a delta CRL; a complete one is needed")
        if isinstance(extension.value, x509.IssuingDistributionPoint):
            if fault := _scope_fault(extension.value, distribution_point):
                raise PKIError(fault)
        elif extension.critical and extension.oid not in _UNDERSTOOD:
            raise PKIError(f"it has the critical extension {extension.oid.dotted_string}, which is not supported")
    if parsed.next_update_utc is None:
        raise PKIError("it has no nextUpdate, so nobody could tell when it expires")
    try:
        number = parsed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except x509.ExtensionNotFound:
        number = int(parsed.last_update_utc.timestamp())
    if not 0 <= number < _LARGEST_NUMBER:
        raise PKIError("its CRL number has more than 20 octets (RFC 5280 5.2.3)")
    crl = RevocationList(parsed.issuer.rfc4514_string(), number, parsed.last_update_utc, parsed.next_update_utc, der)
    return crl, authority


def _scope_fault(scope: x509.IssuingDistributionPoint, distribution_point: str | None) -> str | None:
    """Return why a list does not cover all device certificates (RFC 5280 5.2.5), whether critical or not."""
    if scope.only_contains_ca_certs or scope.only_contains_attribute_certs:
        return "it does not cover device certificates (its issuing distribution point says so)"
    if scope.indirect_crl or scope.only_some_reasons:
        return "it is an indirect CRL or covers only some reasons; a complete one is needed"
    if scope.relative_name is not None:
        return "it names its distribution point relative to the issuer, which is not supported"
    names = [str(name.value) for name in scope.full_name or ()]
    if not names or distribution_point in names:
        return None
    return (
        f"it names the distribution point {', '.join(names)}: brokers would refuse every certificate that does not "
        f"name it too; if all certificates of this authority name it, give --distribution-point {names[0]}"
    )


def check_entries(der: bytes) -> None:
    """
    Check that brokers can read every entry; a broker that cannot would refuse everybody.

    Raises:
        PKIError: An entry cannot be read.
    """
    try:
        for entry in list_der.entries_in(_parse(der).entries):
            _check(entry)
    except ValueError as error:
        raise PKIError(f"it has an entry that cannot be read: {error}") from error


def _check(entry: RawEntry) -> None:
    where = f"its entry for serial number {entry.serial:x}"
    if odd := [oid for oid, critical, _ in entry.extensions if critical and oid not in _UNDERSTOOD_OF_ENTRIES]:
        raise PKIError(f"{where} has the critical extension {dotted(odd[0])}, which is not supported")
    if not serial_is_kept(entry.serial) or not entry.revoked_at.year >= 1950:
        raise PKIError(f"{where} has a serial number or a time that cannot be stored")
    try:
        _reason(entry)
    except ValueError as error:
        raise PKIError(f"{where} cannot be read: {error}") from None


def _reason(entry: RawEntry) -> str:
    """Return the name of an entry's reason; empty if it has none."""
    reasons = [list_der.reason_in(value) for oid, _, value in entry.extensions if oid == list_der.CRL_REASON]
    if not reasons:
        return ""
    if len(reasons) > 1 or reasons[0] not in _REASON_NAMES:
        raise ValueError(f"reason {reasons[0]} is not allowed on a complete list")
    return _REASON_NAMES[reasons[0]]


def _der(content: bytes) -> bytes:
    """
    Return a file's list as DER.

    Raises:
        PKIError: The file holds no list.
    """
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise PKIError("it is UTF-16 text; save it as ASCII, or use the DER form")
    if content[:1] == b"\x30":
        return content
    try:
        if block := _PEM.search(content):
            return base64.b64decode(b"".join(block[1].split()), validate=True)
    except binascii.Error:
        pass
    raise PKIError(f"{_NO_LIST}: there is no PEM block of this kind in it")


def _parse(der: bytes) -> ListParts:
    try:
        parts = list_der.take_apart(der)
        _ = list(parts.empty.extensions), parts.empty.issuer  # cryptography parses these lazily
    except LIBRARY_FAULTS as error:
        raise PKIError(f"{_NO_LIST}: {plain(error)}") from error
    return parts


def _signer(parts: ListParts, authorities: Iterable[x509.Certificate]) -> x509.Certificate:
    issuer = parts.empty.issuer
    for authority in authorities:
        if authority.subject == issuer and is_authority(authority):
            try:
                key = authority.public_key()
                if not isinstance(key, PublicKey):
                    raise UnsupportedAlgorithm("the key must be EC or RSA")
                if _is_signed_by(parts, key):
                    return authority
            except UnsupportedAlgorithm as error:
                raise PKIError(
                    f"the signature of {_name(issuer)} is of an unsupported kind and cannot be checked: {error}"
                ) from None
    raise PKIError(f"none of the given authorities signed it; it claims to be from {_name(issuer)}")


def is_signed_by(der: bytes, key: PublicKey) -> bool:
    """
    Return whether a list carries the signature of a key.

    Raises:
        PKIError: It is no list.
    """
    try:
        return _is_signed_by(_parse(der), key)
    except UnsupportedAlgorithm:
        return False


def _is_signed_by(parts: ListParts, key: PublicKey) -> bool:
    """
    Check the signature over the original bytes of the list.

    Raises:
        UnsupportedAlgorithm: The signature algorithm is not known.
    """
    algorithm, digest = parts.empty.signature_algorithm_parameters, parts.empty.signature_hash_algorithm
    try:
        if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(algorithm, ec.ECDSA):
            key.verify(parts.signature, parts.signed, algorithm)
        elif isinstance(key, rsa.RSAPublicKey) and isinstance(algorithm, padding.PKCS1v15 | padding.PSS) and digest:
            key.verify(parts.signature, parts.signed, algorithm, digest)
        else:
            return False
    except InvalidSignature:
        return False
    return True


def _name(name: x509.Name) -> str:
    return repr(name.rfc4514_string())


def age_fault(crl: RevocationList, now: datetime) -> str | None:
    """Return why a list must not be used now: expired, or from the future; else None."""
    if crl.next_update <= now:
        return f"it is too old: its nextUpdate was {crl.next_update:%Y-%m-%d %H:%M:%S} UTC"
    if crl.this_update > now + CLOCK_SKEW:
        return f"its thisUpdate, {crl.this_update:%Y-%m-%d %H:%M:%S} UTC, is in the future: a clock is wrong"
    return None


def entries_of(der: bytes) -> Iterator[CrlEntry]:
    """Yield the entries of an already checked list; a missing reason is an empty string."""
    for entry in list_der.entries_in(_parse(der).entries):
        yield CrlEntry(f"{entry.serial:x}", _reason(entry), entry.revoked_at)


def next_number(highest: int | None, now: datetime) -> int:
    """
    Return the next CRL number: the time in milliseconds, or one more than the highest so far if that is greater.

    That way numbers keep rising even after the database was restored from a backup that lacks the latest lists.
    """
    return max(int(now.timestamp() * 1000), -1 if highest is None else highest + 1)


def list_pem(der: bytes) -> bytes:
    """Return a list as PEM, the only form that Erlang reads from a hash directory."""
    text = base64.b64encode(der)
    lines = [text[at : at + _PEM_COLUMNS] for at in range(0, len(text), _PEM_COLUMNS)]
    return b"\n".join([b"-----BEGIN X509 CRL-----", *lines, b"-----END X509 CRL-----", b""])


def issuer_hash(authority: x509.Certificate) -> str:
    """
    Return an authority's subject hash, eight hexadecimal digits, as ``openssl x509 -subject_hash`` prints it.

    Source: X509_NAME_hash_ex of OpenSSL: SHA-1 over the name's relative distinguished names, strings as UTF-8, in lower
    case (ASCII only), spaces trimmed and runs of them collapsed. Only a file name; security does not depend on it.
    """
    _, content, _ = element(authority.subject.public_bytes())
    canonical = b"".join(_canonical_rdn(rdn) for _, rdn in elements(content))
    digest = hashlib.sha1(canonical, usedforsecurity=False).digest()
    return digest[3::-1].hex()


def _canonical_rdn(rdn: bytes) -> bytes:
    attributes = []
    for _, attribute in elements(rdn):
        (oid_tag, oid), (tag, value) = elements(attribute)
        encoding = _STRINGS.get(tag) or _WIDE_STRINGS.get(tag)
        if encoding is not None:
            tag, value = 0x0C, _canonical_text(value.decode(encoding)).encode("utf-8")
        attributes.append(encode(0x30, encode(oid_tag, oid) + encode(tag, value)))
    return encode(0x31, b"".join(sorted(attributes)))  # DER sorts the members of a SET OF


def _canonical_text(text: str) -> str:
    words = "".join(" " if letter in _SPACES else letter for letter in text).split(" ")
    joined = " ".join(word for word in words if word)
    return "".join(letter.lower() if letter.isascii() else letter for letter in joined)
