"""Signs certificates of authorities, servers and clients as RFC 5280 requires."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from authbackend.pki.parsing import PKIError, PrivateKey, PublicKey

LONGEST_COMMON_NAME = 64
"""RFC 5280 appendix A: ub-common-name."""

CLOCK_SKEW = timedelta(minutes=5)
"""How much earlier a certificate becomes valid, because devices' clocks may be behind."""

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


def subject_of(common_names: Sequence[str]) -> x509.Name:
    """
    Return a subject that consists only of common names.

    Raises:
        ValueError: One is empty or has more than 64 characters.
    """
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in common_names])


def validity(not_before: datetime | None, not_after: datetime | None, lifetime: timedelta) -> tuple[datetime, datetime]:
    """Return start and end of validity; by default, it starts five minutes ago by this machine's clock."""
    begin = not_before or min(datetime.now(UTC), not_after or datetime.max.replace(tzinfo=UTC)) - CLOCK_SKEW
    return begin, not_after or begin + lifetime


def sign_authority(
    subject: x509.Name,
    public_key: PublicKey,
    *,
    issuer: x509.Name,
    key: PrivateKey,
    valid: tuple[datetime, datetime],
    path_length: int,
) -> x509.Certificate:
    """
    Sign an authority's certificate; if the key is its own, it is a root.

    Args:
        path_length: How many authorities may come between it and an end-entity certificate.
    Raises:
        ValueError: The validity ends before it begins.
    """
    builder = _builder(subject, issuer, public_key, valid, key)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
    builder = builder.add_extension(_key_usage("key_cert_sign", "crl_sign"), critical=True)
    return builder.sign(key, hashes.SHA256())


def sign_leaf(
    subject: x509.Name,
    public_key: PublicKey,
    *,
    issuer: x509.Name,
    key: PrivateKey,
    valid: tuple[datetime, datetime],
    usage: x509.ObjectIdentifier,
    alternative: Sequence[x509.GeneralName],
) -> x509.Certificate:
    """
    Sign an end-entity certificate.

    Args:
        usage: Its only extended key usage, for a server or for a client.
        alternative: Its subject alternative names; may be empty.
    Raises:
        ValueError: The validity ends before it begins.
    """
    usages = ["digital_signature"]
    if isinstance(public_key, rsa.RSAPublicKey):  # old devices may still use RSA key exchange in TLS 1.2
        usages.append("key_encipherment")
    builder = _builder(subject, issuer, public_key, valid, key)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(*usages), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    if alternative:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternative), critical=False)
    return builder.sign(key, hashes.SHA256())


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_pem(key: PrivateKey, passphrase: bytes | None = None) -> bytes:
    """
    Return a private key as PKCS #8 PEM, encrypted if a passphrase is given.

    Raises:
        PKIError: The passphrase is shorter than 12 characters.
    """
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        if len(passphrase) < 12:
            raise PKIError("the passphrase of an authority's key must have at least 12 characters")
        encryption = serialization.BestAvailableEncryption(passphrase)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def _key_usage(*allowed: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{usage: usage in allowed for usage in _KEY_USAGES})


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: PublicKey,
    valid: tuple[datetime, datetime],
    key: PrivateKey,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())  # 159 random bits
        .not_valid_before(valid[0])
        .not_valid_after(valid[1])
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
