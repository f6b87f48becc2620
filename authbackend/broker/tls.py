"""TLS contexts for listeners, with certificates that are reloaded while the listener runs."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path

import structlog

from authbackend.errors import ConfigurationError

log = structlog.get_logger(__name__)

_CHECK_INTERVAL_S = 2.0


class TLSFiles:
    """
    Certificate files of a listener, read again when one changes; an open connection keeps the certificates it has.

    Args:
        section: Section of the settings, for messages: broker, health.
        client_ca: Set for mutual TLS: the handshake refuses clients without a certificate from this CA.
    Raises:
        ConfigurationError: A file is missing, unreadable, or does not match the others.
    """

    def __init__(self, section: str, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self.section = section
        self._files = [file for file in (certificate, key, client_ca) if file is not None]
        self._certificate = certificate
        self._key = key
        self._client_ca = client_ca
        self._stamps = self._read_stamps()
        self._current = self._load()
        self.context = self._load()
        self.context.sni_callback = self._choose  # called in every handshake, even without a server name

    def reload_if_changed(self) -> bool:
        """
        Read the files again if one has changed, and return whether one had.

        Raises:
            ConfigurationError: The new files cannot be used; the old certificates stay.
        """
        if self._read_stamps() == self._stamps:
            return False
        self.reload()
        return True

    def reload(self) -> None:
        """
        Read the files again.

        Raises:
            ConfigurationError: The new files cannot be used; the old certificates stay.
        """
        stamps = self._read_stamps()
        self._current = self._load()
        self._stamps = stamps

    def _no_passphrase(self) -> str:
        """Refuse an encrypted key; otherwise OpenSSL would prompt at the terminal and block the process."""
        raise ConfigurationError(
            f"{self.section}.tls: the key {self._key} is encrypted, and a service cannot ask for its passphrase; "
            f"store it unencrypted, readable by the service only: openssl pkey -in {self._key} -out NEW_FILE"
        )

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = self._current

    def _read_stamps(self) -> list[tuple[int, int]]:
        try:
            return [(stat.st_mtime_ns, stat.st_ino) for stat in (file.stat() for file in self._files)]
        except OSError as error:
            raise ConfigurationError(f"{self.section}.tls: cannot read {error.filename}: {error.strerror}") from error

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # Resuming a session skips the check of the client certificate, even if its CA has been removed since. So: no
        # tickets, and no TLS 1.2, whose session ids cannot be disabled here. Erlang 23 and later support TLS 1.3.
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0
        try:
            context.load_cert_chain(self._certificate, self._key, self._no_passphrase)
            if self._client_ca is not None:
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(self._client_ca)
        except (OSError, ssl.SSLError) as error:
            names = ", ".join(str(file) for file in self._files)
            raise ConfigurationError(f"{self.section}.tls: {names} cannot be used together: {error}") from error
        return context


async def watch(files: TLSFiles, reload: asyncio.Event) -> None:
    """
    Check the certificate files for changes every two seconds, until cancelled.

    Args:
        reload: Set it to read them immediately, changed or not.
    """
    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reload.wait(), _CHECK_INTERVAL_S)
        try:
            if reload.is_set():
                reload.clear()
                files.reload()
                log.info("certificates.reloaded", listener=files.section)
            elif files.reload_if_changed():
                log.info("certificates.reloaded", listener=files.section)
        except ConfigurationError as error:
            log.error("certificates.not_reloaded", listener=files.section, fault=error.detail)
