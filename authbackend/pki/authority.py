"""
A bench certificate authority: enough to try the service and to test it, in a few lines that can be read
through.

It is meant for demonstrations and tests. Its keys lie unencrypted beside its certificates, it keeps no list
of what it issued, and it revokes nothing. In production, certificates come from the organisation's own
authority; what they must look like is what this one makes.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_LIFETIME = timedelta(days=5 * 365)
LEAF_LIFETIME = timedelta(days=398)
_CLOCK_SKEW = timedelta(minutes=5)
_KEY_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


class PKIError(Exception):
    """A certificate, a key or a name cannot be used; the message says which, and what to do."""


@dataclass(frozen=True, slots=True)
class Issued:
    """
    A certificate and the private key that belongs to it.

    Attributes:
        certificate_pem: one X.509 certificate, PEM.
        key_pem: EC P-256 private key, PKCS #8, PEM, not encrypted.
    """

    certificate_pem: bytes
    key_pem: bytes


class Authority:
    """
    A root authority that signs servers and clients directly (path length 0), ECDSA P-256 with SHA-256.

    Make one with :meth:`create` or :meth:`load`.
    """

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key

    @classmethod
    def create(cls, common_name: str, *, not_before: datetime | None = None, not_after: datetime | None = None) -> Self:
        """
        Make a new authority with a fresh key, valid for five years from now unless told otherwise.

        Args:
            common_name: the subject, 1 to 64 characters.
            not_before: first moment of validity, with a time zone.
            not_after: last moment of validity, with a time zone.

        Raises:
            ValueError: the name is too long, or the validity ends before it begins.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        name = _subject([common_name])
        builder = _builder(name, name, key.public_key(), not_before, not_after, AUTHORITY_LIFETIME)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_key_usage("key_cert_sign", "crl_sign"), critical=True)
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def load(cls, certificate_pem: bytes, key_pem: bytes) -> Self:
        """
        Take up an authority that was written before.

        Raises:
            PKIError: not PEM, an encrypted key, a key that is not EC, a key of another certificate, or no CA.
        """
        certificate = read_certificate(certificate_pem)
        key = read_key(key_pem)
        if key.public_key() != certificate.public_key():
            raise PKIError("the key does not belong to the certificate")
        if not _is_authority(certificate):
            raise PKIError("the certificate is no authority's: its basic constraints lack CA")
        return cls(certificate, key)

    @property
    def certificate_pem(self) -> bytes:
        """The authority's own certificate, PEM: what others put into their list of trusted authorities."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The authority's private key, PKCS #8, PEM, not encrypted."""
        return _key_pem(self._key)

    def issued(self, certificate_pem: bytes) -> bool:
        """
        Tell whether this authority signed the certificate (the signature is verified, validity is not).

        Raises:
            PKIError: not a PEM certificate.
        """
        certificate = read_certificate(certificate_pem)
        try:
            certificate.verify_directly_issued_by(self._certificate)
        except (ValueError, TypeError, InvalidSignature):  # another name, another kind of key, another key
            return False
        return True

    def issue_server(
        self, names: Sequence[str], *, not_before: datetime | None = None, not_after: datetime | None = None
    ) -> Issued:
        """
        Issue a server certificate for these host names and addresses; the first one is also the common name.

        Args:
            names: DNS names and IP addresses in text, at least one. Only these are in the certificate.
            not_before: first moment of validity; five minutes ago by default.
            not_after: last moment of validity; 398 days later by default.

        Raises:
            PKIError: no name at all, or one that is neither an address nor an ASCII DNS name.
        """
        if not names:
            raise PKIError("a server certificate needs at least one host name or address")
        alternative = [_server_name(name) for name in names]
        subject = _subject([names[0][:64]])
        return self._issue(
            subject, alternative, ExtendedKeyUsageOID.SERVER_AUTH, not_before=not_before, not_after=not_after
        )

    def issue_client(
        self,
        common_name: str,
        *,
        more_common_names: Sequence[str] = (),
        dns_names: Sequence[str] | None = None,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
    ) -> Issued:
        """
        Issue a client certificate. Names are taken as given, so that a test can ask for a bad one.

        Args:
            common_name: what RabbitMQ logs the client in as, 1 to 64 characters of any kind.
            more_common_names: further common names in the same subject; RabbitMQ joins them with commas.
            dns_names: alternative names; the common name by default, or none if that is not ASCII.
            not_before: first moment of validity; five minutes ago by default.
            not_after: last moment of validity; 398 days later by default.

        Raises:
            ValueError: a common name longer than X.509 allows, or a validity that ends before it begins.
        """
        if dns_names is None:
            dns_names = [common_name] if common_name.isascii() else []
        return self._issue(
            _subject([common_name, *more_common_names]),
            [x509.DNSName(name) for name in dns_names],
            ExtendedKeyUsageOID.CLIENT_AUTH,
            not_before=not_before,
            not_after=not_after,
        )

    def _issue(
        self,
        subject: x509.Name,
        alternative: Sequence[x509.GeneralName],
        usage: x509.ObjectIdentifier,
        *,
        not_before: datetime | None,
        not_after: datetime | None,
    ) -> Issued:
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = self._certificate.subject
        builder = _builder(subject, issuer, key.public_key(), not_before, not_after, LEAF_LIFETIME)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage("digital_signature"), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = builder.add_extension(issuer_key, critical=False)
        if alternative:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternative), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        return Issued(certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key))


def read_certificate(certificate_pem: bytes) -> x509.Certificate:
    """
    Parse the first certificate of a PEM text.

    Raises:
        PKIError: there is none.
    """
    try:
        return x509.load_pem_x509_certificate(certificate_pem)
    except ValueError as error:
        raise PKIError(f"not a PEM certificate: {error}") from error


def read_key(key_pem: bytes) -> ec.EllipticCurvePrivateKey:
    """
    Parse an unencrypted EC private key.

    Raises:
        PKIError: not PEM, encrypted, or of another kind.
    """
    try:
        key = serialization.load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError) as error:  # TypeError: the key is encrypted
        raise PKIError(f"not an unencrypted PEM private key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise PKIError("not an EC private key")
    return key


def server_names(certificate_pem: bytes) -> frozenset[str]:
    """
    List the DNS names and IP addresses a certificate is good for.

    Raises:
        PKIError: not a PEM certificate.
    """
    extensions = read_certificate(certificate_pem).extensions
    try:
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return frozenset()
    addresses = (str(address) for address in names.get_values_for_type(x509.IPAddress))
    return frozenset([*names.get_values_for_type(x509.DNSName), *addresses])


def normal_server_name(name: str) -> str:
    """
    Write a host name or an address the way :func:`server_names` reports it: lower case, addresses shortened.

    Raises:
        PKIError: it is neither.
    """
    return str(_server_name(name).value)


def _server_name(name: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    labels = name.lower().removeprefix("*.").split(".")
    if len(name) <= 253 and all(_is_label(label) for label in labels):
        return x509.DNSName(name.lower())
    raise PKIError(f"{name!r} is neither a host name nor an IP address (a port or a scheme does not belong here)")


def _is_label(label: str) -> bool:
    return 1 <= len(label) <= 63 and label.isascii() and label.replace("-", "").replace("_", "").isalnum()


def _subject(common_names: Sequence[str]) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in common_names])


def _key_usage(*allowed: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{usage: usage in allowed for usage in _KEY_USAGES})


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    not_before: datetime | None,
    not_after: datetime | None,
    lifetime: timedelta,
) -> x509.CertificateBuilder:
    # A beginning a little in the past, because the clocks of devices are not ours.
    begin = not_before or min(datetime.now(UTC), not_after or datetime.max.replace(tzinfo=UTC)) - _CLOCK_SKEW
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(not_after or begin + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
