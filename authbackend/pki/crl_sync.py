"""
Keeps a revocation list beside a broker up to date: fetched, checked, and replaced as a whole in RabbitMQ's
``ssl_crl_hash_dir``.

What is fetched is believed only if the authority signed it, it is in its time, and its number is not lower than that of
the list there; else the list there stays. Without a list, or with one past its nextUpdate, the broker refuses everybody.
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
"""So long the service is asked to wait for another list."""

LATE_SHARE = 0.25
"""With less than this share of its lifetime left, a list is late: it should have been replaced at half of it."""

_TELL_AGAIN_S = 60.0
_TIMEOUT = aiohttp.ClientTimeout(total=WAIT_S + 30, connect=5)


@dataclass(frozen=True, slots=True)
class Synced:
    """What a look at the source came to: the list that is in place now, and whether it is new there."""

    path: Path
    list: RevocationList
    new: bool


class Sync:
    """
    One list, from one or several addresses, in one folder.

    Args:
        urls: Where the same list is; the first that answers well is taken.
        authorities: Certificates; the one that signed the list decides the file's name.
        distribution_point: See :func:`read_list`.
        folder: Made if absent, mode 755. The file is mode 644: a list is public.
        tls: For https addresses; unset, the system's authorities are believed.
        seen: Told at every look what is in the folder, read from its file.
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
        self._told: dict[str, float] = {}

    async def run(self, interval_s: float) -> None:
        """Follow the source until cancelled; faults are logged, and the list there stays."""
        self._folder.mkdir(parents=True, exist_ok=True)
        async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
            while True:
                begin = time.monotonic()
                try:
                    self._report(await self._look(session, wait=True))
                except (AuthbackendError, OSError) as error:
                    self._tell("crl.not_updated", error=str(error))
                    self._report_age()
                await asyncio.sleep(max(0.0, interval_s - (time.monotonic() - begin)))

    async def once(self) -> Synced:
        """
        Look at the source once.

        Raises:
            Unavailable: No address answers.
            PKIError: What they answer cannot be used.
            OSError: The file cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
            synced = await self._look(session, wait=False)
            self._report_age()
            return synced

    async def _look(self, session: aiohttp.ClientSession, *, wait: bool) -> Synced:
        faults: list[AuthbackendError] = []
        try:
            self._tls.reload_if_changed()
        except InvalidInput as error:  # the old ones stay
            self._tell("crl.tls_files_not_reloaded", error=error.detail)
        for url in self._urls:
            try:
                return self._take(url, await self._fetch(session, url, wait=wait))
            except AuthbackendError as error:
                faults.append(error)
        text = "; ".join(fault.detail for fault in faults)
        refused = all(isinstance(fault, PKIError) for fault in faults)
        raise (PKIError if refused else Unavailable)(text)

    async def _fetch(self, session: aiohttp.ClientSession, url: str, *, wait: bool) -> bytes:
        headers = {}
        etag, content = self._etags.get(url, ("", b""))
        if etag and self._is_there(content):
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

    def _is_there(self, content: bytes) -> bool:
        try:
            found, authority = read_list(content, self._authorities, self._distribution_point)
            return self._path(authority).read_bytes() == list_pem(found.der)
        except (OSError, PKIError):
            return False

    def _path(self, authority: x509.Certificate) -> Path:
        return self._folder / f"{issuer_hash(authority)}.r0"

    def _take(self, url: str, content: bytes) -> Synced:
        try:
            found, authority = read_list(content, self._authorities, self._distribution_point)
            if fault := age_fault(found, datetime.now(UTC)):
                raise PKIError(fault)
            path = self._path(authority)
            present = self._present(path)
            if present is not None and present.der == found.der:
                return Synced(path, found, new=False)
            if present is not None and found.number <= present.number:
                how = "older than" if found.number < present.number else "another one with"
                raise PKIError(f"its number {found.number} is {how} the number {present.number} of the list in {path}")
            check_entries(found.der)
        except PKIError as error:
            raise PKIError(f"what {url} serves is not used: {error.detail}") from error
        write_file(path, list_pem(found.der), 0o644)
        return Synced(path, found, new=True)

    def _present(self, path: Path) -> RevocationList | None:
        try:
            return read_list(path.read_bytes(), self._authorities, self._distribution_point)[0]
        except FileNotFoundError:
            return None
        except PKIError as error:  # half of a list, or another's: what was checked is better in any case
            self._tell("crl.file_unusable", path=str(path), error=error.detail)
            return None

    def _report(self, synced: Synced) -> None:
        if synced.new:
            log.info(
                "crl.replaced",
                path=str(synced.path),
                number=synced.list.number,
                next_update=synced.list.next_update.isoformat(),
            )
        self._told.pop("crl.not_updated", None)
        self._report_age()

    def _report_age(self) -> None:
        """Say it when a list in place is late or too old."""
        now = datetime.now(UTC)
        for authority in self._authorities:
            path = self._path(authority)
            present = self._present(path)
            if present is None:
                continue
            if self._seen is not None:
                self._seen(present)
            left = present.next_update - now
            if left.total_seconds() <= 0:
                self._tell("crl.expired", level="error", path=str(path), effect="the broker refuses every certificate")
            elif left < (present.next_update - present.this_update) * LATE_SHARE:
                self._tell("crl.late", path=str(path), next_update=present.next_update.isoformat())

    def _tell(self, event: str, level: str = "warning", **values: str) -> None:
        """Log a lasting fault once a minute."""
        now = time.monotonic()
        if now - self._told.get(event, -_TELL_AGAIN_S) >= _TELL_AGAIN_S:
            self._told[event] = now
            (log.error if level == "error" else log.warning)(event, **values)


async def _body(answer: aiohttp.ClientResponse, url: str) -> bytes:
    content = bytearray()
    async for chunk in answer.content.iter_chunked(65536):
        content += chunk
        if len(content) > LARGEST_LIST_BYTES:
            raise PKIError(f"{url} serves more than {LARGEST_LIST_BYTES // 1024**2} MiB: that is no revocation list")
    return bytes(content)
