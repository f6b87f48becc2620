"""Certificate revocation lists (RFC 5280 5): signing, checking, and the name that OpenSSL and Erlang look for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import CRLEntryExtensionOID, ExtensionOID

from authbackend.pki.der import element, elements, encode
from authbackend.pki.reading import LIBRARY_FAULTS, PKIError, PrivateKey, PublicKey, is_authority, plain

REASONS = {flag.value: flag for flag in x509.ReasonFlags if flag is not x509.ReasonFlags.remove_from_crl}
"""Reason names of RFC 5280 5.3.1 as they are kept; every other text is listed as unspecified."""

HOLD = "certificateHold"
"""The one reason that is not for good; kept nowhere, and effective while a list of an outside authority has it."""

CLOCK_SKEW = timedelta(minutes=5)
_UNDERSTOOD = {ExtensionOID.CRL_NUMBER, ExtensionOID.AUTHORITY_KEY_IDENTIFIER}
_UNDERSTOOD_OF_ENTRIES = {CRLEntryExtensionOID.CRL_REASON, CRLEntryExtensionOID.INVALIDITY_DATE}
_STRINGS = {0x0C: "utf-8", 0x13: "latin-1", 0x14: "latin-1", 0x16: "latin-1", 0x1A: "latin-1"}
_WIDE_STRINGS = {0x1C: "utf-32-be", 0x1E: "utf-16-be"}
_SPACES = " \t\n\v\f\r"


@dataclass(frozen=True, slots=True)
class Entry:
    """
    A revoked certificate on a list.

    Attributes:
        serial: lower-case hexadecimal digits, as in the table ``certificate``.
        reason: a reason name of RFC 5280, or any text, which is listed without a reason; empty for none.
    """

    serial: str
    reason: str
    revoked_at: datetime


@dataclass(frozen=True, slots=True)
class RevocationList:
    """
    A list as it was signed.

    Attributes:
        issuer: subject of the authority, RFC 4514.
        number: its CRL number (RFC 5280 5.2.3).
        der: the list itself.
    """

    issuer: str
    number: int
    this_update: datetime
    next_update: datetime
    der: bytes


def sign_list(
    entries: Sequence[Entry],
    *,
    issuer: x509.Certificate,
    key: PrivateKey,
    number: int,
    now: datetime,
    lifetime: timedelta,
) -> RevocationList:
    """
    Sign a list.

    Args:
        number: Greater than that of the list before.
        now: Its thisUpdate; nextUpdate is ``lifetime`` later.
    Cost: about 10 microseconds an entry.
    """
    now = now.replace(microsecond=0)
    builder = x509.CertificateRevocationListBuilder(
        issuer.subject, revoked_certificates=[_revoked(entry, now) for entry in entries]
    )
    signed = (
        builder.last_update(now)
        .next_update(now + lifetime)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .add_extension(x509.CRLNumber(number), critical=False)
        .sign(key, hashes.SHA256())
    )
    return RevocationList(
        issuer.subject.rfc4514_string(), number, now, now + lifetime, signed.public_bytes(serialization.Encoding.DER)
    )


def _revoked(entry: Entry, now: datetime) -> x509.RevokedCertificate:
    builder = (
        x509.RevokedCertificateBuilder()
        .serial_number(int(entry.serial, 16))
        .revocation_date(min(entry.revoked_at, now).replace(microsecond=0))
    )
    reason = REASONS.get(entry.reason, x509.ReasonFlags.unspecified)
    if reason is not x509.ReasonFlags.unspecified:  # RFC 5280 5.3.1: then the extension should be absent
        builder = builder.add_extension(x509.CRLReason(reason), critical=False)
    return builder.build()


def read_list(
    content: bytes, authorities: Iterable[x509.Certificate], distribution_point: str | None = None
) -> tuple[RevocationList, x509.Certificate]:
    """
    Parse a list, DER or PEM, and return it with the authority that signed it.

    A list without a number (RFC 5280 demands one, OpenSSL can leave it out) gets its thisUpdate in seconds for one.

    Args:
        authorities: Who may have signed it.
        distribution_point: The address that every certificate of the authority names. A list that names one is taken
            only with it: Erlang refuses each certificate that does not name the same.
    Raises:
        PKIError: It is no list, none of the authorities signed it, it does not cover all certificates of devices, or it
            is of a kind that RabbitMQ and this service do not understand: a delta, an indirect one, one without
            nextUpdate.
    """
    parsed = _parse(content)
    authority = _signer(parsed, authorities)
    for extension in parsed.extensions:
        if extension.oid == ExtensionOID.DELTA_CRL_INDICATOR:
            raise PKIError("it is a delta list; a complete one is needed")
        if isinstance(extension.value, x509.IssuingDistributionPoint):
            if fault := _scope_fault(extension.value, distribution_point):
                raise PKIError(fault)
        elif extension.critical and extension.oid not in _UNDERSTOOD:
            raise PKIError(f"it has the critical extension {extension.oid.dotted_string}, which is not understood here")
    if parsed.next_update_utc is None:
        raise PKIError("it has no nextUpdate, so nobody could tell when it is too old")
    try:
        number = parsed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except x509.ExtensionNotFound:
        number = int(parsed.last_update_utc.timestamp())
    der = parsed.public_bytes(serialization.Encoding.DER)
    found = RevocationList(parsed.issuer.rfc4514_string(), number, parsed.last_update_utc, parsed.next_update_utc, der)
    return found, authority


def _scope_fault(scope: x509.IssuingDistributionPoint, distribution_point: str | None) -> str | None:
    """Return why a list does not cover every certificate of a device (RFC 5280 5.2.5), critical or not."""
    if scope.only_contains_ca_certs or scope.only_contains_attribute_certs:
        return "it is for other certificates than those of devices (its issuing distribution point says so)"
    if scope.indirect_crl or scope.only_some_reasons:
        return "it is an indirect list or one for some reasons only; a complete one is needed"
    if scope.relative_name is not None:
        return "it names its distribution point relative to the issuer, which is not supported"
    names = [str(name.value) for name in scope.full_name or ()]
    if not names or distribution_point in names:
        return None
    return (
        f"it names the distribution point {', '.join(names)}: brokers then refuse every certificate that does not name "
        f"it too; if all certificates of this authority do, give --distribution-point {names[0]}"
    )


def check_entries(der: bytes) -> None:
    """
    Make sure that brokers can read what is on a list; a broker that cannot would refuse everybody.

    Raises:
        PKIError: An entry is not such.
    """
    for revoked in x509.load_der_x509_crl(der):
        try:
            odd = [one for one in revoked.extensions if one.critical and one.oid not in _UNDERSTOOD_OF_ENTRIES]
        except LIBRARY_FAULTS as error:
            raise PKIError(f"its entry for serial number {revoked.serial_number:x} cannot be read: {error}") from None
        if odd:
            raise PKIError(
                f"its entry for serial number {revoked.serial_number:x} has the critical extension {odd[0].oid.dotted_string}, which is not understood here"
            )


def _parse(content: bytes) -> x509.CertificateRevocationList:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise PKIError("it is UTF-16 text; save it as ASCII, or take the DER form")
    try:
        pem = b"-----BEGIN" in content and content[:1] != b"\x30"
        parsed = x509.load_pem_x509_crl(content) if pem else x509.load_der_x509_crl(content)
        list(parsed.extensions)
        return parsed
    except LIBRARY_FAULTS as error:
        raise PKIError(
            f"it is no certificate revocation list that can be read, neither DER nor PEM: {plain(error)}"
        ) from error


def _signer(parsed: x509.CertificateRevocationList, authorities: Iterable[x509.Certificate]) -> x509.Certificate:
    for authority in authorities:
        if authority.subject == parsed.issuer and is_authority(authority):
            try:
                key = authority.public_key()
                if not isinstance(key, PublicKey):
                    raise UnsupportedAlgorithm("possible are EC and RSA keys")
                if parsed.is_signature_valid(key):
                    return authority
            except UnsupportedAlgorithm as error:
                raise PKIError(
                    f"the kind of signature of {_name(parsed.issuer)} is not supported, so it cannot be checked: {error}"
                ) from None
    raise PKIError(f"it is signed by none of the authorities given here; it says to be of {_name(parsed.issuer)}")


def _name(name: x509.Name) -> str:
    return repr(name.rfc4514_string())


def age_fault(found: RevocationList, now: datetime) -> str | None:
    """Return why a list is not to be used at this moment, or None."""
    if found.next_update <= now:
        return f"it is too old: its nextUpdate was {found.next_update:%Y-%m-%d %H:%M:%S} UTC"
    if found.this_update > now + CLOCK_SKEW:
        return f"its thisUpdate, {found.this_update:%Y-%m-%d %H:%M:%S} UTC, is in the future: a clock is wrong"
    return None


def entries_of(der: bytes) -> Iterator[Entry]:
    """Yield what is on a list that was checked before; a reason that is not there is the empty text."""
    for revoked in x509.load_der_x509_crl(der):
        try:
            reason = str(revoked.extensions.get_extension_for_class(x509.CRLReason).value.reason.value)
        except x509.ExtensionNotFound:
            reason = ""
        yield Entry(f"{revoked.serial_number:x}", reason, revoked.revocation_date_utc)


def next_number(highest: int | None, now: datetime) -> int:
    """
    Return the number of the next list: the time in milliseconds, or one more than the highest so far if that is greater.

    So the numbers go on rising after the database was restored from a backup that lacks the latest lists.
    """
    return max(int(now.timestamp() * 1000), -1 if highest is None else highest + 1)


def list_pem(der: bytes) -> bytes:
    """Return a list as PEM, the only form that Erlang reads from a hash directory."""
    return x509.load_der_x509_crl(der).public_bytes(serialization.Encoding.PEM)


def issuer_hash(authority: x509.Certificate) -> str:
    """
    Return eight hexadecimal digits: what ``openssl x509 -subject_hash`` prints for an authority.

    Source: X509_NAME_hash_ex of OpenSSL: SHA-1 over the name's relative distinguished names, strings as UTF-8, in lower
    case (ASCII only), spaces trimmed and each run of them one. A file name, not a protection.
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
