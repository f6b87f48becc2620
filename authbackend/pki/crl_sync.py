"""
Keeps a broker's revocation list up to date: fetches it, checks it, and replaces the file atomically in RabbitMQ's
``ssl_crl_hash_dir``.

A fetched list is used only if the authority signed it, it is currently valid, and its CRL number is not lower than the
installed list's; otherwise the installed list stays. Without a list, or after its nextUpdate, the broker refuses everybody.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
import structlog
from cryptography import x509

from authbackend.errors import AuthbackendError, InvalidInput, Unavailable
from authbackend.pki.client_tls import ClientTLS
from authbackend.pki.crl import RevocationList, age_fault, check_entries, issuer_hash, list_pem, read_list
from authbackend.pki.files import write_file
from authbackend.pki.parsing import PKIError

log = structlog.get_logger(__name__)

LARGEST_LIST_BYTES = 64 * 1024**2
WAIT_S = 25
"""How long the service is asked to wait for a new list."""

LATE_SHARE = 0.25
"""A list is late with less than this share of its lifetime left: it should have been replaced at half."""

_LOG_AGAIN_S = 60.0
_TIMEOUT = aiohttp.ClientTimeout(total=WAIT_S + 30, connect=5)


@dataclass(frozen=True, slots=True)
class Synced:
    """The list that is installed after a sync, and whether this sync installed it."""

    path: Path
    list: RevocationList
    new: bool


class Sync:
    """
    Syncs one list from one or several URLs into a folder.

    Args:
        urls: URLs of the same list; the first one with a usable answer wins.
        authorities: Certificates; the one that signed the list determines the file's name.
        distribution_point: See :func:`read_list`.
        folder: Created if absent, mode 755. The file is mode 644: a list is public.
        tls: For https URLs; by default, the system's authorities are trusted.
        seen: Called at every sync with the installed list, as read from its file.
    """

    def __init__(
        self,
        urls: Sequence[str],
        authorities: Sequence[x509.Certificate],
        folder: Path,
        *,
        seen: Callable[[RevocationList], None] | None = None,
        distribution_point: str | None = None,
        tls: ClientTLS | None = None,
    ) -> None:
        self._seen = seen
        self._tls = tls or ClientTLS()
        self._urls = tuple(urls)
        self._authorities = tuple(authorities)
        self._folder = folder
        self._distribution_point = distribution_point
        self._etags: dict[str, tuple[str, bytes]] = {}
        self._logged_at: dict[str, float] = {}

    async def run(self, interval_s: float) -> None:
        """Sync until cancelled; errors are logged, and the installed list stays."""
        self._folder.mkdir(parents=True, exist_ok=True)
        async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
            while True:
                begin = time.monotonic()
                try:
                    self._report(await self._sync(session, wait=True))
                except (AuthbackendError, OSError) as error:
                    self._log_fault("crl.not_updated", error=str(error))
                    self._report_age()
                await asyncio.sleep(max(0.0, interval_s - (time.monotonic() - begin)))

    async def once(self) -> Synced:
        """
        Sync once.

        Raises:
            Unavailable: No URL answers.
            PKIError: None of the answers can be used.
            OSError: The file cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
            synced = await self._sync(session, wait=False)
            self._report_age()
            return synced

    async def _sync(self, session: aiohttp.ClientSession, *, wait: bool) -> Synced:
        faults: list[AuthbackendError] = []
        try:
            self._tls.reload_if_changed()
        except InvalidInput as error:  # the old files stay in use
            self._log_fault("crl.tls_files_not_reloaded", error=error.detail)
        for url in self._urls:
            try:
                return self._install(url, await self._fetch(session, url, wait=wait))
            except AuthbackendError as error:
                faults.append(error)
        text = "; ".join(fault.detail for fault in faults)
        refused = all(isinstance(fault, PKIError) for fault in faults)
        raise (PKIError if refused else Unavailable)(text)

    async def _fetch(self, session: aiohttp.ClientSession, url: str, *, wait: bool) -> bytes:
        headers = {}
        etag, content = self._etags.get(url, ("", b""))
        if etag and self._is_installed(content):
            headers = {"If-None-Match": etag, **({"Prefer": f"wait={WAIT_S}"} if wait else {})}
        try:
            async with session.get(url, headers=headers, allow_redirects=False, ssl=self._tls.context) as answer:
                if answer.status == 304 and etag:
                    return content
                if answer.status != 200:
                    raise Unavailable(f"{url} answers {answer.status}")
                content = await _body(answer, url)
                self._etags[url] = (answer.headers.get("ETag", ""), content)
                return content
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise Unavailable(f"{url} cannot be reached: {self._tls.fault(error, url)}") from error

    def _is_installed(self, content: bytes) -> bool:
        try:
            crl, authority = read_list(content, self._authorities, self._distribution_point)
            return self._path(authority).read_bytes() == list_pem(crl.der)
        except (OSError, PKIError):
            return False

    def _path(self, authority: x509.Certificate) -> Path:
        return self._folder / f"{issuer_hash(authority)}.r0"

    def _install(self, url: str, content: bytes) -> Synced:
        try:
            crl, authority = read_list(content, self._authorities, self._distribution_point)
            if fault := age_fault(crl, datetime.now(UTC)):
                raise PKIError(fault)
            path = self._path(authority)
            installed = self._installed(path)
            if installed is not None and installed.der == crl.der:
                return Synced(path, crl, new=False)
            if installed is not None and crl.number <= installed.number:
                if crl.number < installed.number:
                    raise PKIError(
                        f"its number {crl.number} is lower than number {installed.number} of the list in {path}"
                    )
                raise PKIError(f"its number {crl.number} is also that of the list in {path}, which differs from it")
            check_entries(crl.der)
        except PKIError as error:
            raise PKIError(f"the list from {url} is not used: {error.detail}") from error
        write_file(path, list_pem(crl.der), 0o644)
        return Synced(path, crl, new=True)

    def _installed(self, path: Path) -> RevocationList | None:
        try:
            return read_list(path.read_bytes(), self._authorities, self._distribution_point)[0]
        except FileNotFoundError:
            return None
        except PKIError as error:  # truncated, or another authority's: a checked list is always better
            self._log_fault("crl.file_unusable", path=str(path), error=error.detail)
            return None

    def _report(self, synced: Synced) -> None:
        if synced.new:
            log.info(
                "crl.replaced",
                path=str(synced.path),
                number=synced.list.number,
                next_update=synced.list.next_update.isoformat(),
            )
        self._logged_at.pop("crl.not_updated", None)
        self._report_age()

    def _report_age(self) -> None:
        """Log a warning if an installed list is late or has expired."""
        now = datetime.now(UTC)
        for authority in self._authorities:
            path = self._path(authority)
            installed = self._installed(path)
            if installed is None:
                continue
            if self._seen is not None:
                self._seen(installed)
            left = installed.next_update - now
            if left.total_seconds() <= 0:
                self._log_fault("crl.expired", "error", path=str(path), effect="the broker refuses every certificate")
            elif left < (installed.next_update - installed.this_update) * LATE_SHARE:
                self._log_fault("crl.late", path=str(path), next_update=installed.next_update.isoformat())

    def _log_fault(self, event: str, level: str = "warning", **values: str) -> None:
        """Log a persisting fault at most once a minute."""
        now = time.monotonic()
        if now - self._logged_at.get(event, -_LOG_AGAIN_S) >= _LOG_AGAIN_S:
            self._logged_at[event] = now
            (log.error if level == "error" else log.warning)(event, **values)


async def _body(answer: aiohttp.ClientResponse, url: str) -> bytes:
    content = bytearray()
    async for chunk in answer.content.iter_chunked(65536):
        content += chunk
        if len(content) > LARGEST_LIST_BYTES:
            raise PKIError(f"{url} serves more than {LARGEST_LIST_BYTES // 1024**2} MiB: that is not a revocation list")
    return bytes(content)
