"""TLS for ``crl sync``, the client that fetches CRLs on a broker's host, and explanations of its errors."""

from __future__ import annotations

import ssl
from pathlib import Path

import aiohttp

from authbackend.errors import InvalidInput

_CERTIFICATE = {
    # OpenSSL's X509_V_ERR_* numbers
    9: "is not valid yet: is this host's clock right?",
    10: "has expired, or its authority's has: give the server a new one (health.tls.certificate_file of the replica)",
    62: "is for another name: use a name from the certificate in --url, or give the server a certificate for the name in --url",
    64: "is for another address: use a name from the certificate in --url, or give the server a certificate for the address in --url",
}
_UNKNOWN_AUTHORITY = (2, 18, 19, 20, 21)
_REASONS = (
    ("CERTIFICATE_REQUIRED", "the server demands a client certificate: give --tls-cert and --tls-key"),
    ("UNKNOWN_CA", "the server does not know the authority of --tls-cert"),
    ("CERTIFICATE_EXPIRED", "the server refuses --tls-cert, which has expired"),
    ("BAD_CERTIFICATE", "the server refuses --tls-cert"),
    ("CERTIFICATE_UNKNOWN", "the server refuses --tls-cert"),
    ("UNSUPPORTED_CERTIFICATE", "the server refuses --tls-cert, which is not for clients"),
    ("PROTOCOL_VERSION", "no TLS version that both sides allow; the service speaks TLS 1.3"),
    ("WRONG_VERSION_NUMBER", "the server does not speak TLS: use http://, or set health.tls on the replica"),
    ("RECORD_LAYER_FAILURE", "the server does not speak TLS: use http://, or set health.tls on the replica"),
)


class ClientTLS:
    """
    A TLS client whose files are read again when one changes.

    Args:
        authority: The authority of the server's certificate, PEM; None: the system's authorities.
        certificate: The certificate for a server that asks for one, PEM.
        key: Its private key, PEM, not encrypted.
    Raises:
        InvalidInput: A file cannot be used, or only one of certificate and key is given.
    """

    def __init__(self, authority: Path | None = None, certificate: Path | None = None, key: Path | None = None) -> None:
        if (certificate is None) != (key is None):
            raise InvalidInput("--tls-cert and --tls-key go together: give both or none")
        self._authority = authority
        self._certificate = certificate
        self._key = key
        self._stamps = self._read_stamps()
        self.context = self._load()

    def reload_if_changed(self) -> None:
        """
        Read the files again if one has changed.

        Raises:
            InvalidInput: The new files cannot be used; the old ones stay in use.
        """
        stamps = self._read_stamps()
        if stamps != self._stamps:
            self.context = self._load()
            self._stamps = stamps

    def fault(self, error: Exception, url: str) -> str:
        """Explain a request's error to whoever has to fix it."""
        cause = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"the server's certificate {self._not_accepted(cause)}"
        if isinstance(cause, ssl.SSLError):
            reason = cause.reason or ""
            why = next((words for part, words in _REASONS if part in reason), reason or "the TLS handshake failed")
            return f"no TLS connection: {why}"
        if isinstance(cause, aiohttp.ServerDisconnectedError | ConnectionResetError):
            if not url.startswith("https:"):
                return "the server closed the connection without an answer; if it speaks TLS (health.tls), use https://"
            if self._certificate is None:
                return "the server closed the connection without an answer; if it demands a client certificate (health.tls.client_ca_file), give --tls-cert and --tls-key"
            return "the server closed the connection without an answer; it may have refused --tls-cert: its authority must be in health.tls.client_ca_file"
        return str(error) or type(error).__name__

    def _not_accepted(self, error: ssl.SSLCertVerificationError) -> str:
        if error.verify_code not in _UNKNOWN_AUTHORITY:
            return _CERTIFICATE.get(error.verify_code, f"is not accepted: {error.verify_message}")
        if self._authority is None:
            return "is from no authority that this host knows: give the one that signed it with --tls-ca"
        return f"is not from an authority in {self._authority}: give the one that signed it with --tls-ca"

    def _read_stamps(self) -> list[tuple[int, int]]:
        files = [file for file in (self._authority, self._certificate, self._key) if file is not None]
        try:
            return [(stat.st_mtime_ns, stat.st_ino) for stat in (file.stat() for file in files)]
        except OSError as error:
            raise InvalidInput(f"cannot read {error.filename}: {error.strerror}") from error

    def _load(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self._authority)
        except (OSError, ssl.SSLError) as error:
            raise InvalidInput(f"--tls-ca {self._authority} cannot be used: {error.strerror or error}") from error
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # trust an intermediate without its root
        if self._certificate is not None:
            try:
                context.load_cert_chain(self._certificate, self._key, self._no_passphrase)
            except (OSError, ssl.SSLError) as error:
                why = error.strerror or error
                raise InvalidInput(
                    f"--tls-cert {self._certificate} and --tls-key {self._key} cannot be used together: {why}"
                ) from error
        return context

    def _no_passphrase(self) -> str:
        """Refuse an encrypted key; without this, OpenSSL would prompt on the terminal."""
        raise InvalidInput(
            f"--tls-key {self._key} is encrypted; store it without a passphrase, readable only by this user: "
            f"openssl pkey -in {self._key} -out NEW_FILE"
        )
