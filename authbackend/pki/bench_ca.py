"""
A bench certificate authority: just enough to try out and test the service, and short enough to read through.

For demonstrations and tests only: its keys are stored unencrypted next to its certificates, it keeps no record
of what it issued, and it cannot revoke. In production, use your organisation's own authority, or one made with
:mod:`authbackend.pki.ca`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from authbackend.pki import signing
from authbackend.pki.parsing import (
    PKIError,
    PrivateKey,
    is_authority,
    normal_server_name,
    read_certificate,
    read_key,
    server_name,
    server_names,
)

__all__ = [
    "Authority",
    "Issued",
    "PKIError",
    "normal_server_name",
    "read_certificate",
    "read_key",
    "server_names",
]

AUTHORITY_LIFETIME = timedelta(days=5 * 365)
LEAF_LIFETIME = timedelta(days=398)


@dataclass(frozen=True, slots=True)
class Issued:
    """
    A certificate and its private key.

    Attributes:
        certificate_pem: One X.509 certificate, PEM.
        key_pem: EC P-256 private key, PKCS #8, PEM, not encrypted.
    """

    certificate_pem: bytes
    key_pem: bytes


class Authority:
    """
    A root authority that signs server and client certificates directly (path length 0), ECDSA P-256 with SHA-256.

    Create one with :meth:`create` or :meth:`load`.
    """

    def __init__(self, certificate: x509.Certificate, key: PrivateKey) -> None:
        self._certificate = certificate
        self._key = key

    @classmethod
    def create(cls, common_name: str, *, not_before: datetime | None = None, not_after: datetime | None = None) -> Self:
        """
        Create an authority with a new key, by default valid for five years from now.

        Args:
            common_name: The subject, 1 to 64 characters.
            not_before: Start of validity, with a time zone.
            not_after: End of validity, with a time zone.

        Raises:
            ValueError: The name is too long, or the validity ends before it begins.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        name = signing.subject_of([common_name])
        valid = signing.validity(not_before, not_after, AUTHORITY_LIFETIME)
        return cls(
            signing.sign_authority(name, key.public_key(), issuer=name, key=key, valid=valid, path_length=0), key
        )

    @classmethod
    def load(cls, certificate_pem: bytes, key_pem: bytes) -> Self:
        """
        Load an existing authority.

        Raises:
            PKIError: Not PEM, an encrypted key, an unsupported kind of key, a key that does not match the certificate,
                or a certificate that is not a CA.
        """
        certificate = read_certificate(certificate_pem)
        key = read_key(key_pem)
        if key.public_key() != certificate.public_key():
            raise PKIError("the key does not belong to the certificate")
        if not is_authority(certificate):
            raise PKIError("the certificate is not an authority: its basic constraints lack CA")
        return cls(certificate, key)

    @property
    def certificate_pem(self) -> bytes:
        """The authority's own certificate, PEM: what others add to their trusted authorities."""
        return signing.certificate_pem(self._certificate)

    @property
    def key_pem(self) -> bytes:
        """The authority's private key, PKCS #8, PEM, not encrypted."""
        return signing.key_pem(self._key)

    def issued(self, certificate_pem: bytes) -> bool:
        """
        Return whether this authority signed the certificate (checks the signature, not the validity).

        Raises:
            PKIError: Not a PEM certificate.
        """
        certificate = read_certificate(certificate_pem)
        try:
            certificate.verify_directly_issued_by(self._certificate)
        except (ValueError, TypeError, InvalidSignature):  # issuer name, kind of key or key differs
            return False
        return True

    def issue_server(
        self, names: Sequence[str], *, not_before: datetime | None = None, not_after: datetime | None = None
    ) -> Issued:
        """
        Issue a server certificate for these host names and addresses; the first is also the common name.

        Args:
            names: DNS names and IP addresses as text, at least one. The certificate contains only these.
            not_before: Start of validity; five minutes ago by default.
            not_after: End of validity; 398 days after ``not_before`` by default.

        Raises:
            PKIError: No name, or one that is neither an IP address nor an ASCII DNS name.
        """
        if not names:
            raise PKIError("a server certificate needs at least one host name or address")
        alternative = [server_name(name) for name in names]
        subject = signing.subject_of([names[0][:64]])
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
        Issue a client certificate. Names are not checked, so that a test can ask for a bad one.

        Args:
            common_name: The user name RabbitMQ logs the client in as, 1 to 64 characters of any kind.
            more_common_names: Further common names in the same subject; RabbitMQ joins them with commas.
            dns_names: Subject alternative names; by default the common name, or none if that is not ASCII.
            not_before: Start of validity; five minutes ago by default.
            not_after: End of validity; 398 days after ``not_before`` by default.

        Raises:
            ValueError: A common name longer than X.509 allows, or a validity that ends before it begins.
        """
        if dns_names is None:
            dns_names = [common_name] if common_name.isascii() else []
        return self._issue(
            signing.subject_of([common_name, *more_common_names]),
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
        certificate = signing.sign_leaf(
            subject,
            key.public_key(),
            issuer=self._certificate.subject,
            key=self._key,
            valid=signing.validity(not_before, not_after, LEAF_LIFETIME),
            usage=usage,
            alternative=alternative,
        )
        return Issued(signing.certificate_pem(certificate), signing.key_pem(key))
