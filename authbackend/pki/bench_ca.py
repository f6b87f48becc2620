"""
A bench certificate authority: enough to try the service and to test it, in a few lines that can be read
through.

It is meant for demonstrations and tests. Its keys lie unencrypted beside its certificates, it keeps no list
of what it issued, and it revokes nothing. In production, certificates come from the organisation's own
authority, or from one of :mod:`authbackend.pki.ca`.
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

    def __init__(self, certificate: x509.Certificate, key: PrivateKey) -> None:
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
        name = signing.subject_of([common_name])
        valid = signing.validity(not_before, not_after, AUTHORITY_LIFETIME)
        return cls(
            signing.sign_authority(name, key.public_key(), issuer=name, key=key, valid=valid, path_length=0), key
        )

    @classmethod
    def load(cls, certificate_pem: bytes, key_pem: bytes) -> Self:
        """
        Take up an authority that was written before.

        Raises:
            PKIError: not PEM, an encrypted key, a key of another kind or certificate, or no CA.
        """
        certificate = read_certificate(certificate_pem)
        key = read_key(key_pem)
        if key.public_key() != certificate.public_key():
            raise PKIError("the key does not belong to the certificate")
        if not is_authority(certificate):
            raise PKIError("the certificate is no authority's: its basic constraints lack CA")
        return cls(certificate, key)

    @property
    def certificate_pem(self) -> bytes:
        """The authority's own certificate, PEM: what others put into their list of trusted authorities."""
        return signing.certificate_pem(self._certificate)

    @property
    def key_pem(self) -> bytes:
        """The authority's private key, PKCS #8, PEM, not encrypted."""
        return signing.key_pem(self._key)

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
