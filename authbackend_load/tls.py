"""
TLS without I/O: bytes in, bytes out.

Each device has its own ``SSLContext``, made before the test begins: loading a certificate and its key takes half as
long as the handshake, and would otherwise be measured with it.
"""

from __future__ import annotations

import ssl
from pathlib import Path

_READ_BYTES = 16_384


class TLSError(Exception):
    """The TLS connection failed; the text is the cause in a few words, the same for all devices."""


def make_context(certificate_file: Path | str, ca_file: Path | str | None, tls_version: str = "") -> ssl.SSLContext:
    """
    Return the TLS context of one device.

    Args:
        certificate_file: Certificate and unencrypted private key in one PEM file.
        ca_file: The authority of the broker's certificate, PEM; None: accept any certificate.
        tls_version: ``1.2`` or ``1.3`` for only that version; empty: the broker chooses.
    Raises:
        OSError: A file cannot be read, or its content cannot be used (ssl.SSLError).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if tls_version:
        only = ssl.TLSVersion.TLSv1_2 if tls_version == "1.2" else ssl.TLSVersion.TLSv1_3
        context.minimum_version = context.maximum_version = only
    if ca_file is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(ca_file)
    context.load_cert_chain(certificate_file)
    return context


class TLS:
    """
    One TLS connection of a client; after every call, send what :meth:`output` returns.

    Args:
        server_name: The name that must be in the broker's certificate.
    """

    def __init__(self, context: ssl.SSLContext, server_name: str) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)
        self.established = False
        """Whether the handshake is complete on this end; with TLS 1.3, the broker can still refuse the certificate."""
        self.closed = False
        """Whether the broker has closed its side of the connection."""

    def output(self) -> bytes:
        """Return the bytes to send, once."""
        return self._outgoing.read()

    def begin(self) -> None:
        """
        Start the handshake.

        Raises:
            TLSError: It failed.
        """
        self._handshake()

    def receive(self, data: bytes) -> bytes:
        """
        Process bytes from the broker and return the decrypted content; empty during the handshake.

        Raises:
            TLSError: The handshake or the connection failed.
        """
        self._incoming.write(data)
        if not self.established:
            self._handshake()
            if not self.established:
                return b""
        pieces = []
        try:
            while piece := self._object.read(_READ_BYTES):
                pieces.append(piece)
            self.closed = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.closed = True
        except ssl.SSLError as error:
            raise TLSError(_cause(error)) from error
        return b"".join(pieces)

    def send(self, data: bytes) -> None:
        """
        Encrypt bytes for the broker, after the handshake.

        Raises:
            TLSError: The connection has failed.
        """
        try:
            self._object.write(data)
        except ssl.SSLError as error:
            raise TLSError(_cause(error)) from error

    def _handshake(self) -> None:
        try:
            self._object.do_handshake()
            self.established = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            raise TLSError(_cause(error)) from error


def _cause(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the broker's certificate: {error.verify_message}"
    return (error.reason or str(error)).lower().replace("_", " ")
