"""
Signs and publishes CRLs: signs a new one when a certificate is revoked and long before nextUpdate, and hands all lists
over to be served from memory.

A command, or any replica that has the authority's key, signs in one transaction under one lock, from committed data. If
two sign at the same time, there are two lists, and the later one contains everything that is on the earlier one.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import structlog

from authbackend.backoff import Backoff, Reachability
from authbackend.certificates.crl_endpoint import PublishedCrl
from authbackend.certificates.metrics import CertificateMetrics
from authbackend.errors import AuthbackendError, ConfigurationError
from authbackend.file_stamps import Stamps, stamps
from authbackend.logs.fault_log import FaultLog
from authbackend.pki.ca import AUTHORITY_FILES, AuthorityFolder
from authbackend.pki.crl import CrlEntry, RevocationList, entries_of, next_number
from authbackend.pki.crl_sync import WAIT_S
from authbackend.postgres import certificates as store
from authbackend.postgres import crls
from authbackend.postgres.connection import Connection, Target, connected, translated_errors
from authbackend.postgres.crls import StoredCrl
from authbackend.postgres.listener import Listener
from authbackend.settings import Pki

log = structlog.get_logger(__name__)

CHECK_S = 30.0
"""How often lists are checked without a notification."""
EXPIRY_S = 300.0
MISSED_REPORTS = 4
"""A report of installed lists counts until this many further reports are overdue."""


def open_authority(pki: Pki) -> AuthorityFolder | None:
    """
    Load the authority whose list this replica signs; None without ``pki.authority_dir``.

    Raises:
        ConfigurationError: It cannot be loaded.
    """
    if pki.authority_dir is None:
        return None
    if pki.passphrase_file is None:
        raise ConfigurationError(
            "pki.authority_dir needs pki.passphrase_file, with the passphrase of the authority's key"
        )
    try:
        passphrase = read_passphrase(pki.passphrase_file)
        return AuthorityFolder.open(pki.authority_dir, passphrase)
    except AuthbackendError as error:
        raise ConfigurationError(f"pki.authority_dir: {error.detail}") from error


class WatchedAuthority:
    """
    The authority of ``pki.authority_dir``, reloaded when one of its files changes.

    Raises:
        ConfigurationError: It cannot be loaded.
    """

    def __init__(self, pki: Pki) -> None:
        self._pki = pki
        self._loaded_stamps = self._stamps()
        self.current = open_authority(pki)

    def read_if_changed(self) -> None:
        """
        Read the files again if one of them changed.

        Raises:
            ConfigurationError: They cannot be used, or are incomplete; ``current`` stays, the next call tries again.
        """
        current_stamps = self._stamps()
        if current_stamps == self._loaded_stamps:
            return
        self.current = open_authority(self._pki)
        self._loaded_stamps = current_stamps
        if self.current is not None:
            log.info("crl.authority_reloaded", authority=self.current.name)

    def _stamps(self) -> Stamps:
        folder, passphrase_file = self._pki.authority_dir, self._pki.passphrase_file
        if folder is None or passphrase_file is None:
            return ()
        return stamps([passphrase_file, *(folder / name for name in AUTHORITY_FILES)])


def read_passphrase(file: Path) -> bytes:
    """
    Return the passphrase in a file, without its last newline.

    Raises:
        ConfigurationError: The file cannot be read or is empty.
    """
    try:
        passphrase = file.read_bytes().removesuffix(b"\n").removesuffix(b"\r")
    except OSError as error:
        raise ConfigurationError(f"cannot read the passphrase file {file}: {error.strerror}") from error
    if not passphrase:
        raise ConfigurationError(f"the passphrase file {file} is empty")
    return passphrase


async def save_authority(connection: Connection, authority: AuthorityFolder) -> None:
    """
    Record an authority in the database.

    Raises:
        Conflict: Another one has its name.
    """
    pem = authority.certificate_pem.decode("ascii")
    await store.save_authority(connection, authority.name, authority.subject, pem, authority.not_after)


async def sign(
    connection: Connection,
    authority: AuthorityFolder,
    lifetime: timedelta,
    *,
    anyway: bool = False,
    known: Mapping[str, StoredCrl] | None = None,
) -> StoredCrl | None:
    """
    Sign the list of an authority if something revoked is missing from it or half its lifetime has passed.

    Call it in the transaction that revokes: the list contains those revocations, and both are committed or neither. The
    time is the database's, so that a replica whose clock is wrong does not sign a list that brokers refuse.

    Args:
        anyway: Sign even if nothing changed.
        known: Lists that the caller already has, by authority; they are not fetched again.
    Returns:
        The new list, or None if the current one is up to date.
    """
    if not anyway and not await _due(connection, authority, lifetime, known):
        return None
    await crls.lock_list(connection, authority.name)
    if not anyway and not await _due(connection, authority, lifetime, known):
        return None  # another process has signed it in the meantime
    moment = await crls.fetch_moment(connection, authority.subject)
    now = moment.now
    revoked = await crls.fetch_revoked(connection, authority.subject, now - lifetime)
    entries = [CrlEntry(*row) for row in revoked]
    number = next_number(moment.highest, now)
    signed = await asyncio.to_thread(authority.sign_list, entries, number, now, lifetime)
    stored = StoredCrl(number, signed.this_update, signed.next_update, signed.der)
    await crls.save_crl(connection, authority.name, stored, [entry.serial for entry in entries])
    return stored


async def _current_list(connection: Connection, name: str, known: Mapping[str, StoredCrl] | None) -> StoredCrl | None:
    authorities = await crls.fetch_authorities(connection, name, known)
    return authorities[0].list if authorities else None


async def _due(
    connection: Connection,
    authority: AuthorityFolder,
    lifetime: timedelta,
    known: Mapping[str, StoredCrl] | None,
) -> bool:
    current = await _current_list(connection, authority.name, known)
    moment = await crls.fetch_moment(connection, authority.subject)
    now = moment.now
    if current is None or current.this_update > now:  # brokers refuse a list that is not valid yet
        return True
    if (moment.highest or 0) > current.number:  # the database was restored: brokers' hosts have a newer list
        return True
    if now >= current.this_update + min(lifetime, current.next_update - current.this_update) / 2:
        return True
    if not await asyncio.to_thread(authority.has_signed_list, current.der):  # brokers that trust the new key refuse it
        return True
    revoked = await crls.fetch_revoked(connection, authority.subject, now)
    listed = await asyncio.to_thread(_listed, current.der)
    # Signed by a version that did not record what is on a list: receipts would wait for entries that are already there.
    return moment.listed != len(listed) or not {serial for serial, _, _ in revoked} <= listed


@functools.lru_cache(maxsize=2)
def _listed(der: bytes) -> frozenset[str]:
    """Return the serial numbers on a list; cached, since every change of a certificate needs them."""
    return frozenset(entry.serial for entry in entries_of(der))


class InstallReporter:
    """
    Reports to the database which lists are installed on a node's host.

    Args:
        node: RabbitMQ's name for it: ``rabbit@HOST``.
        every_s: How often the installed lists are checked.
    """

    def __init__(self, target: Target, node: str, every_s: float) -> None:
        self._target = target
        self._node = node
        self._counts_s = MISSED_REPORTS * (CHECK_S + max(every_s, WAIT_S))
        self._installed: dict[str, RevocationList] = {}
        self._reported: dict[str, tuple[int, float]] = {}
        self._seen = asyncio.Event()

    def seen(self, installed: RevocationList) -> None:
        """Take note of a list that has just been read from its file."""
        self._installed[installed.issuer] = installed
        number, at = self._reported.get(installed.issuer, (None, 0.0))
        if number != installed.number or time.monotonic() - at >= CHECK_S:
            self._seen.set()

    async def report(self) -> None:
        """
        Report the installed lists.

        Raises:
            AuthbackendError: The database cannot be reached or refuses.
        """
        for issuer, crl in list(self._installed.items()):
            await crls.report_list(self._target, self._node, issuer, crl.number, crl.next_update, self._counts_s)
            self._reported[issuer] = crl.number, time.monotonic()

    async def run(self) -> None:
        """Report until cancelled; a fault is logged once, and the report is tried again."""
        faults, backoff, reachability = (
            FaultLog("crl.not_reported", "crl.reported", node=self._node),
            Backoff(),
            Reachability(),
        )
        while True:
            await self._seen.wait()
            self._seen.clear()
            try:
                await self.report()
                faults.succeeded()
                backoff.reset()
            except AuthbackendError as error:
                faults.failed(error.detail)
                self._seen.set()
                await reachability.pause(backoff)


class CrlPublisher:
    """
    Publishes all authorities' lists from memory, signs one authority's list, and counts expiring certificates.

    Args:
        authority: The authority whose list this replica signs, None if it signs none; a watched one is reloaded when
            its files change.
        lifetime_s: From thisUpdate to nextUpdate of the lists it signs.
        reachability: Shared by everything in this process that needs the database.
        publish: Receives the lists of all authorities, to serve them; they stay while the database is away.
        tell: Receives the metrics.
    """

    def __init__(
        self,
        target: Target,
        authority: AuthorityFolder | WatchedAuthority | None,
        lifetime_s: float,
        reachability: Reachability | None = None,
        publish: Callable[[dict[str, PublishedCrl]], object] = lambda _: None,
        tell: Callable[[CertificateMetrics], object] = lambda _: None,
    ) -> None:
        self._publish_lists = publish
        self._tell_metrics = tell
        self.metrics = CertificateMetrics()
        self._target = target
        self._watched = authority if isinstance(authority, WatchedAuthority) else None
        self._authority = authority.current if isinstance(authority, WatchedAuthority) else authority
        self._lifetime = timedelta(seconds=lifetime_s)
        self._known: dict[str, StoredCrl] = {}
        self._counted_at: float | None = None
        self._reachability = reachability or Reachability()
        self._backoff = Backoff()
        self._faults = FaultLog("crl.refresh_failed", "crl.following")

    async def run(self) -> None:
        """Sign and publish until cancelled; each fault is logged once, and the work is tried again."""
        while True:
            try:
                async with connected(self._target) as connection:
                    listener = Listener(connection)
                    await listener.listen(*crls.CHANNELS)
                    self._reachability.succeeded()
                    await self._follow(connection, listener)
            except AuthbackendError as error:
                self._faults.failed(error.detail)
            except Exception as error:  # a late list is noticed, by brokers and an alert; decisions go on
                if not self._faults.failing:
                    log.exception("crl.refresh_crashed")
                self._faults.failed(f"{type(error).__name__} while reading revocation lists")
            await self._reachability.pause(self._backoff)

    async def _follow(self, connection: Connection, listener: Listener) -> None:
        with translated_errors():
            while True:
                fault = await self._read_authority()
                if self._authority is not None:
                    unknown = await self._unknown_authority(connection, self._authority)
                    if unknown is None:
                        await self._sign(connection, self._authority)
                    fault = fault or unknown
                await self._publish(connection)
                await self._count(connection)
                self._tell_metrics(self.metrics)
                if fault is None:
                    self._faults.succeeded()
                else:
                    self._faults.failed(fault)
                self._backoff.reset()
                await listener.wait(CHECK_S)

    async def _read_authority(self) -> str | None:
        """Reload the authority if its files have changed; return why they cannot be used, or None."""
        if self._watched is None:
            return None
        try:
            await asyncio.to_thread(self._watched.read_if_changed)
        except ConfigurationError as error:
            return error.detail
        self._authority = self._watched.current
        return None

    async def _unknown_authority(self, connection: Connection, authority: AuthorityFolder) -> str | None:
        """Return why the list of ``pki.authority_dir`` cannot be signed, or None."""
        recorded = await crls.fetch_authorities(connection, authority.name, self._known)
        if recorded and recorded[0].subject == authority.subject:
            return None
        return f"authority {authority.name} of pki.authority_dir is not in the database; run: authbackend crl sign DIR"

    async def _sign(self, connection: Connection, authority: AuthorityFolder) -> None:
        async with connection.transaction():
            signed = await sign(connection, authority, self._lifetime, known=self._known)
        if signed is not None:
            log.info(
                "crl.signed",
                authority=authority.name,
                number=signed.number,
                next_update=signed.next_update.isoformat(),
                size_bytes=len(signed.der),
            )

    async def _publish(self, connection: Connection) -> None:
        recorded = await crls.fetch_authorities(connection, None, self._known)
        self._known = lists = {authority.name: authority.list for authority in recorded if authority.list is not None}
        self.metrics.authorities = {authority.name: authority.not_after.timestamp() for authority in recorded}
        self.metrics.this_updates = {name: stored.this_update.timestamp() for name, stored in lists.items()}
        self.metrics.next_updates = {name: stored.next_update.timestamp() for name, stored in lists.items()}
        self._publish_lists({name: PublishedCrl(each.der, each.this_update) for name, each in lists.items()})

    async def _count(self, connection: Connection) -> None:
        if self._counted_at is not None and time.monotonic() - self._counted_at < EXPIRY_S:
            return
        expiring = await crls.fetch_expiring(connection)
        self.metrics.within = expiring.within
        self.metrics.expired = expiring.expired
        self.metrics.most_on_a_day = expiring.most_on_a_day
        self._counted_at = time.monotonic()
