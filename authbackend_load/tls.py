"""
TLS without input and output of its own: bytes in, bytes out.

Each device has its own ``SSLContext``, made before the test begins: reading a certificate and its key takes half as long
as the handshake, and would otherwise be part of what is measured.
"""

from __future__ import annotations

import ssl
from pathlib import Path

_READ_BYTES = 16_384


class TLSError(Exception):
    """The TLS connection failed; the text is the cause in a few words, the same for all devices it happens to."""


def make_context(certificate_file: Path | str, ca_file: Path | str | None, tls_version: str = "") -> ssl.SSLContext:
    """
    Return the TLS settings of one device.

    Args:
        certificate_file: certificate and unencrypted private key in one PEM file.
        ca_file: the authority of the broker's certificate, PEM; None trusts any broker.
        tls_version: ``1.2`` or ``1.3`` for just that one; empty lets the broker choose.
    Raises:
        OSError: a file cannot be read, or does not contain that (ssl.SSLError).
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
    One TLS connection of a client. Send what :meth:`output` gives after every call.

    Args:
        server_name: what must be in the broker's certificate.
    """

    def __init__(self, context: ssl.SSLContext, server_name: str) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)
        self.established = False
        """Whether the handshake is over, as far as this end knows: with TLS 1.3 the broker can still refuse."""
        self.closed = False
        """Whether the broker said that it sends no more."""

    def output(self) -> bytes:
        """Take what is to be sent."""
        return self._outgoing.read()

    def begin(self) -> None:
        """
        Write the first message of the handshake.

        Raises:
            TLSError: it failed.
        """
        self._handshake()

    def receive(self, data: bytes) -> bytes:
        """
        Take bytes from the broker and return what they say, decrypted; empty while the handshake lasts.

        Raises:
            TLSError: the handshake or the connection failed.
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
        Encrypt bytes for the broker, once the handshake is over.

        Raises:
            TLSError: the connection failed before.
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
