"""Client certificates for tests, and the TLS contexts to use them."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from authbackend.pki import der
from authbackend.pki.bench_ca import Authority, Issued
from authbackend.pki.bench_certificates import make_certificates


@dataclass(frozen=True, slots=True)
class Identity:
    """A client's certificate files, and the authority that it trusts."""

    name: str
    certificate_file: Path
    key_file: Path
    ca_file: Path

    def context(self) -> ssl.SSLContext:
        """Return the TLS context of a client that presents this certificate and verifies the server."""
        context = anonymous_context(self.ca_file)
        context.load_cert_chain(self.certificate_file, self.key_file)
        return context


def anonymous_context(ca_file: Path | str) -> ssl.SSLContext:
    """Return the TLS context of a client without a certificate that verifies the server."""
    return ssl.create_default_context(cafile=str(ca_file))


def with_serial(certificate: x509.Certificate, serial: int, key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the certificate (PEM) with any other serial number: ``cryptography`` makes none of zero or below."""
    fields = list(der.elements(der.element(certificate.tbs_certificate_bytes)[1]))
    fields[1] = (0x02, der.integer(serial))
    body = der.encode(0x30, b"".join(der.encode(*field) for field in fields))
    signature = der.encode(0x03, b"\0" + key.sign(body, ec.ECDSA(hashes.SHA256())))
    return ssl.DER_cert_to_PEM_cert(der.encode(0x30, body + der.encode(*fields[2]) + signature)).encode()


class Certificates:
    """The directory of ``authbackend certs``, and client certificates made on demand."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for _ in make_certificates(directory):
            pass
        self.ca_file = directory / "ca.pem"
        self._authority = Authority.load(self.ca_file.read_bytes(), (directory / "ca.key").read_bytes())
        self.rival = Authority.create("another authority that the lax node trusts")
        self._count = 0

    def device(
        self,
        common_name: str,
        *,
        more_common_names: Sequence[str] = (),
        not_before: datetime | None = None,
        not_after: datetime | None = None,
    ) -> Identity:
        """Issue a client certificate of the devices' authority, with any name and validity."""
        issued = self._authority.issue_client(
            common_name, more_common_names=more_common_names, not_before=not_before, not_after=not_after
        )
        return self._write(common_name, issued)

    def stranger(self, common_name: str) -> Identity:
        """Issue a client certificate with this name from an authority that the broker does not trust."""
        return self._write(common_name, Authority.create("somebody else's CA").issue_client(common_name))

    def named(self, name: str, subject: x509.Name, *, serial: int | None = None, by_rival: bool = False) -> Identity:
        """Issue a client certificate with any subject and serial number, of the devices' authority or of its rival."""
        authority = self.rival if by_rival else self._authority
        issuer = x509.load_pem_x509_certificate(authority.certificate_pem)
        signing_key = serialization.load_pem_private_key(authority.key_pem, None)
        assert isinstance(signing_key, ec.EllipticCurvePrivateKey)
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .sign(signing_key, hashes.SHA256())
        )
        key_pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        if serial is not None:
            pem = with_serial(certificate, serial, signing_key)
        return self._write(name, Issued(pem, key_pem))

    def _write(self, name: str, issued: Issued) -> Identity:
        self._count += 1
        path = self.directory / f"client-{self._count}"
        certificate, key = path.with_suffix(".pem"), path.with_suffix(".key")
        certificate.write_bytes(issued.certificate_pem)
        key.write_bytes(issued.key_pem)
        return Identity(name, certificate, key, self.ca_file)
