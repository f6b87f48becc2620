"""Parses certificates, keys and certificate requests; errors of ``cryptography`` become a :class:`PKIError`."""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.x509.oid import NameOID

from authbackend.errors import InvalidInput

Certificate = x509.Certificate
PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey

KEY_KINDS = ("ec-p256", "ec-p384", "rsa-2048", "rsa-3072", "rsa-4096")
"""Kinds of keys that are generated; the first is the default."""

MOST_SERIAL_DIGITS = 256
"""Longest serial number that can be stored. RFC 5280 allows 40 digits, and no zero or negative ones; RabbitMQ accepts all of them."""

_LONGEST_NAME, _LONGEST_COMMON_NAME, _FIRST_YEAR = 2048, 1024, 1950
_CURVES: tuple[type[ec.EllipticCurve], ...] = (ec.SECP256R1, ec.SECP384R1)


LIBRARY_FAULTS = (
    ValueError,
    TypeError,
    OverflowError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
"""What ``cryptography`` raises for bad input; not all of these are a ValueError."""


class PKIError(InvalidInput):
    """A certificate, key or name that cannot be used; the message says which, and what to do."""


@dataclass(frozen=True, slots=True)
class Record:
    """
    The stored fields of a certificate; the columns of the table ``certificate``.

    Attributes:
        fingerprint: SHA-256 of the DER form, 64 lower-case hexadecimal digits.
        serial: Lower-case hexadecimal digits without leading zeros, with a minus sign if negative.
        issuer: RFC 4514.
        subject: RFC 4514.
        common_name: As RabbitMQ reads it, several joined with commas; empty if there is none.
        key_fingerprint: SHA-256 of its public key (SubjectPublicKeyInfo, DER), hexadecimal digits; None for an unknown kind of key.
    """

    fingerprint: str
    serial: str
    issuer: str
    subject: str
    common_name: str
    not_before: datetime
    not_after: datetime
    key_fingerprint: str | None


def _key_fingerprint(certificate: x509.Certificate) -> str | None:
    try:
        return _fingerprint_of(certificate.public_key())
    except LIBRARY_FAULTS:  # another authority signed it, for a kind of key that is never signed here
        return None


def key_fingerprint(key_info: bytes) -> str | None:
    """Return the fingerprint of a public key (SubjectPublicKeyInfo, DER); None for an unknown kind of key."""
    try:
        return _fingerprint_of(serialization.load_der_public_key(key_info))
    except LIBRARY_FAULTS:
        return None


def _fingerprint_of(key: PublicKeyTypes) -> str:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).hexdigest()


def record_of(certificate: x509.Certificate) -> Record:
    """
    Return the stored fields of a certificate.

    Raises:
        PKIError: Its names, serial number or validity cannot be stored.
    """
    try:
        subject = certificate.subject
        names = [attribute.value for attribute in subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        serial = certificate.serial_number
        record = Record(
            certificate.fingerprint(hashes.SHA256()).hex(),
            f"{serial:x}",
            certificate.issuer.rfc4514_string(),
            subject.rfc4514_string(),
            ",".join(name if isinstance(name, str) else name.decode("latin-1") for name in names),
            certificate.not_valid_before_utc,
            certificate.not_valid_after_utc,
            _key_fingerprint(certificate),
        )
    except LIBRARY_FAULTS as error:
        raise PKIError(f"the certificate cannot be read: {error}") from error
    return recordable(record)


def recordable(record: Record) -> Record:
    """
    Return the record if it can be stored: the table ``certificate`` would refuse it otherwise, and fail a whole import.

    Raises:
        PKIError: Its serial number, names or validity cannot be stored.
    """
    if not serial_is_kept(int(record.serial, 16)):
        raise PKIError(f"its serial number has more than {MOST_SERIAL_DIGITS} hexadecimal digits")
    if "\x00" in record.issuer + record.subject + record.common_name:
        raise PKIError("one of its names contains a zero byte, which cannot be stored")
    if not record.issuer:
        raise PKIError("it has no issuer")
    for what, text, most in (
        ("issuer", record.issuer, _LONGEST_NAME),
        ("subject", record.subject, _LONGEST_NAME),
        ("common name", record.common_name, _LONGEST_COMMON_NAME),
    ):
        if len(text.encode()) > most:
            raise PKIError(f"its {what} has more than {most} bytes")
    if record.not_before.year < _FIRST_YEAR or record.not_after < record.not_before:
        raise PKIError(f"its validity ends before it begins, or begins before {_FIRST_YEAR}")
    return record


def serial_is_kept(number: int) -> bool:
    """Return whether a serial number can be stored: any but very long ones, since brokers do not check them."""
    return abs(number).bit_length() <= 4 * MOST_SERIAL_DIGITS


def is_authority(certificate: x509.Certificate) -> bool:
    """
    Return whether a certificate's basic constraints say CA.

    Raises:
        PKIError: The extensions cannot be read.
    """
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False
    except LIBRARY_FAULTS as error:
        raise PKIError(f"the certificate's extensions cannot be read: {error}") from error


def read_certificate(certificate_pem: bytes) -> x509.Certificate:
    """
    Parse the first certificate of a PEM text.

    Raises:
        PKIError: There is none, or it cannot be read.
    """
    try:
        return _whole(x509.load_pem_x509_certificate(certificate_pem))
    except LIBRARY_FAULTS as error:
        raise PKIError(f"not a readable PEM certificate: {plain(error)}") from error


def read_certificates(certificates_pem: bytes) -> list[x509.Certificate]:
    """
    Parse every certificate of a PEM text, at least one.

    Raises:
        PKIError: There is none, or one cannot be read.
    """
    try:
        return [_whole(one) for one in x509.load_pem_x509_certificates(certificates_pem)]
    except LIBRARY_FAULTS as error:
        raise PKIError(f"not readable PEM certificates: {plain(error)}") from error


def _whole(certificate: x509.Certificate) -> x509.Certificate:
    """Make sure a certificate's names and validity can be parsed: ``cryptography`` parses them lazily."""
    _ = certificate.subject, certificate.issuer, certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return certificate


def read_key(key_pem: bytes, passphrase: bytes | None = None) -> PrivateKey:
    """
    Parse a private key, EC or RSA.

    Raises:
        PKIError: Not PEM, another kind of key, or a wrong passphrase.
    """
    try:
        key = serialization.load_pem_private_key(key_pem, password=passphrase)
    except TypeError as error:  # encrypted and no passphrase, or the other way round
        wanted = "is encrypted: give its passphrase" if passphrase is None else "is not encrypted"
        raise PKIError(f"the private key {wanted}") from error
    except UnsupportedAlgorithm as error:
        raise PKIError(f"the private key is of a kind that is not supported: {error}") from None
    except ValueError as error:
        if passphrase is not None:
            raise PKIError("the private key cannot be read: the passphrase is wrong, or it is not PEM") from None
        raise PKIError(f"not a PEM private key: {plain(error)}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise PKIError("the private key is neither EC nor RSA")
    return key


def new_key(kind: str) -> PrivateKey:
    """Generate a private key of one of :data:`KEY_KINDS`."""
    if kind == "ec-p256":
        return ec.generate_private_key(ec.SECP256R1())
    if kind == "ec-p384":
        return ec.generate_private_key(ec.SECP384R1())
    return rsa.generate_private_key(public_exponent=65537, key_size=int(kind.removeprefix("rsa-")))


def usable_key(key: object, owner: str) -> PublicKey:
    """
    Return the key if certificates may be signed for it: EC P-256 or P-384, RSA from 2048 to 8192 bits.

    Args:
        owner: What the key belongs to, for the message.
    Raises:
        PKIError: Another kind of key, or too weak.
    """
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, _CURVES):
        return key
    if isinstance(key, rsa.RSAPublicKey) and 2048 <= key.key_size <= 8192 and key.public_numbers().e >= 65537:
        return key
    raise PKIError(
        f"{owner} has a key that cannot be certified: it must be EC P-256, EC P-384 or RSA of 2048 to 8192 bits"
    )


def read_request(request_pem: bytes) -> tuple[str, PublicKey]:
    """
    Parse a certificate request (PKCS #10, PEM or DER) and return its common name and its public key.

    The signature is checked, which proves that the requester holds the key (RFC 2986 3). Everything else, above all the
    requested extensions, is ignored: profiles determine what is signed.

    Raises:
        PKIError: Not a request, an unsupported kind, a wrong signature, not exactly one common name, or too weak a key.
    """
    try:
        if request_pem[:1] == b"\x30":
            request = x509.load_der_x509_csr(request_pem)
        else:
            request = x509.load_pem_x509_csr(request_pem.removeprefix(b"\xef\xbb\xbf"))
        names = request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except x509.InvalidVersion as error:
        raise PKIError(
            f"the certificate request has version {error.parsed_version + 1}; only version 1 is supported"
        ) from None
    except LIBRARY_FAULTS as error:
        raise PKIError(f"not a readable certificate request: {plain(error)}") from error
    try:
        key = usable_key(request.public_key(), "the certificate request")
        digest = request.signature_hash_algorithm
        if not isinstance(digest, hashes.SHA256 | hashes.SHA384 | hashes.SHA512):
            name = digest.name.upper() if digest else "no hash"
            raise PKIError(
                f"the certificate request is signed with {name}, which is not accepted; sign it with SHA-256"
            )
        valid = request.is_signature_valid
    except LIBRARY_FAULTS as error:
        raise PKIError(
            f"the certificate request's key or signature is of a kind that is not supported: {error}"
        ) from None
    if not valid:
        raise PKIError("the certificate request's signature is wrong: it was not made with the request's own key")
    if len(names) != 1 or not isinstance(names[0].value, str):
        raise PKIError(f"the certificate request has {len(names)} common names; it needs exactly one")
    return names[0].value, key


def plain(error: Exception) -> str:
    """Explain an error of ``cryptography`` in words that do not require knowing it."""
    text = str(error)
    if "PEM" in text:
        return "there is no PEM block of this kind in it"
    if "PrintableString" in text:
        return "a PrintableString in a name contains a character that this type does not allow, such as _ or !; use UTF8String"
    return text or type(error).__name__


def server_names(certificate_pem: bytes) -> frozenset[str]:
    """
    Return the DNS names and IP addresses a certificate is valid for.

    Raises:
        PKIError: Not a PEM certificate.
    """
    extensions = read_certificate(certificate_pem).extensions
    try:
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return frozenset()
    addresses = (str(address) for address in names.get_values_for_type(x509.IPAddress))
    return frozenset([*names.get_values_for_type(x509.DNSName), *addresses])


def server_name(name: str) -> x509.DNSName | x509.IPAddress:
    """
    Return a host name (lower case) or an IP address as a subject alternative name.

    Raises:
        PKIError: Neither of them.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    labels = name.lower().removeprefix("*.").split(".")
    if len(name) <= 253 and all(_is_label(label) for label in labels):
        return x509.DNSName(name.lower())
    raise PKIError(f"{name!r} is neither a host name nor an IP address (leave out port and scheme)")


def normal_server_name(name: str) -> str:
    """
    Normalize a host name or an address to the form :func:`server_names` returns: lower case, addresses shortened.

    Raises:
        PKIError: Neither of them.
    """
    return str(server_name(name).value)


def _is_label(label: str) -> bool:
    return 1 <= len(label) <= 63 and label.isascii() and label.replace("-", "").replace("_", "").isalnum()
