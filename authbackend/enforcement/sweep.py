"""
The sweep: regularly compare all connections and session queues of a cluster with the registry.

It finds violations that no task covers: after a race or a restored backup, on a broker that asked another auth backend,
or with a certificate that is not the user's. Each is reported, and ended if the settings say so. The comparison is that
of ``checks``; connections and queues are read and ended through ``ClusterActions``.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog

from authbackend.enforcement.checks import (
    CertificatesOnRecord,
    Checker,
    Registry,
    SessionQueue,
    contradiction,
    live_serial,
    shown_names,
    shows_as_recorded,
    shows_certificate,
)
from authbackend.enforcement.clusters import Actions, ClusterActions, Paused, Violation
from authbackend.enforcement.distinguished_names import common_name
from authbackend.enforcement.management_api import LiveConnection
from authbackend.enforcement.tasks import TaskStore, TaskStoreError
from authbackend.errors import AuthbackendError, Unavailable
from authbackend.policy.decide import DecisionSettings
from authbackend.policy.model import Device
from authbackend.policy.reasons import Reason
from authbackend.registry.store import Reader

log = structlog.get_logger(__name__)

UNKNOWN_IDENTITY = "unknown_identity"
DEVICE_NOT_PERMITTED = "device_not_permitted"
ACCOUNT_NOT_PERMITTED = "account_not_permitted"
WRONG_CLIENT_ID = "wrong_client_id"
NAME_NOT_OF_CERTIFICATE = "name_not_of_certificate"
CERTIFICATE_REVOKED = "certificate_revoked"
CERTIFICATE_UNKNOWN = "certificate_unknown"
SESSION_WITHOUT_OWNER = "session_without_owner"
PROPERTY_CONTRADICTS = "property_contradicts"
INCOMPLETE_FACTS = "incomplete_facts"
CAUSES = (
    *(UNKNOWN_IDENTITY, DEVICE_NOT_PERMITTED, ACCOUNT_NOT_PERMITTED, WRONG_CLIENT_ID, NAME_NOT_OF_CERTIFICATE),
    *(CERTIFICATE_REVOKED, CERTIFICATE_UNKNOWN, SESSION_WITHOUT_OWNER, PROPERTY_CONTRADICTS),
    INCOMPLETE_FACTS,
)
"""Everything that a sweep can find; the last two are only reported."""

_CLIENT_ID_REASONS = (Reason.CLIENT_ID_NOT_BOUND, Reason.CLIENT_ID_OF_ANOTHER_DEVICE)
_STATES = ("active", "revoked")
_MAX_ENTRIES = 200
_MAX_INCOMPLETE_ENTRIES = 50
"""If a broker reports too little about every connection, the report still has room for certain violations."""

_OLDEST_COPY_S = 30.0


class SweepObserver(Protocol):
    """Receives the results of sweeps, for metrics."""

    def swept(self, cluster: str, report: Report) -> None:
        """Accept the report of a cluster's sweep."""

    def sweep_failed(self) -> None:
        """Count a failed sweep."""


@dataclass
class Report:
    """
    The report of one sweep of a cluster.

    Args:
        connections: How many connections were compared.
        sessions: How many session queues were compared.
        found: The number of findings, by cause.
        ended: How many of them were closed or deleted, by cause.
        entries: Details of the first findings, for people.
    """

    connections: int = 0
    sessions: int = 0
    duration_s: float = 0.0
    found: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(CAUSES, 0)))
    ended: Counter[str] = field(default_factory=Counter)
    entries: list[dict[str, Any]] = field(default_factory=list)

    def add(self, cause: str, **facts: Any) -> None:
        """Count a finding, and add its facts to the entries while there is room."""
        self.found[cause] += 1
        if cause == INCOMPLETE_FACTS and self.found[cause] > _MAX_INCOMPLETE_ENTRIES:
            return
        if len(self.entries) < _MAX_ENTRIES:
            self.entries.append({"cause": cause, **{k: v for k, v in facts.items() if v is not None}})

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "connections": self.connections,
            "sessions": self.sessions,
            "duration_s": round(self.duration_s, 3),
            "found": self.nonzero(),
            "ended": dict(self.ended),
            "entries": self.entries,
        }

    def nonzero(self) -> dict[str, int]:
        """Return the numbers of findings that are not 0, by cause."""
        return {cause: number for cause, number in self.found.items() if number}


@dataclass(frozen=True, slots=True)
class SweepSettings:
    """
    The settings of the sweep.

    Args:
        closes: The causes for which connections are closed and sessions deleted.
    """

    interval_s: float
    closes: frozenset[str]


class Sweep:
    """The sweeps of one cluster; while enforcement is paused, they report but end nothing."""

    def __init__(
        self,
        store: TaskStore,
        actions: ClusterActions,
        registry: Reader,
        observer: SweepObserver,
        decisions: DecisionSettings,
        settings: SweepSettings,
    ) -> None:
        self._store = store
        self._actions = actions
        self._registry = registry
        self._observer = observer
        self._decisions = decisions
        self._settings = settings

    async def run(self) -> None:
        """
        Sweep until cancelled.

        Raises:
            TaskStoreError: The store cannot be used.
        """
        name = self._actions.name
        while True:
            begin = time.monotonic()
            try:
                report = await self.once()
                await self._store.save_sweep(name, report.as_dict())
            except TaskStoreError:
                raise
            except AuthbackendError as error:
                self._observer.sweep_failed()
                log.warning("sweep.failed", cluster=name, fault=error.detail)
            await asyncio.sleep(max(1.0, self._settings.interval_s - (time.monotonic() - begin)))

    async def once(self) -> Report:
        """
        Sweep the cluster once.

        Raises:
            Unavailable: The cluster does not answer, or the copy of the registry is too old.
        """
        begin = time.monotonic()
        report = Report()
        to_close: list[tuple[str, LiveConnection]] = []
        paused = await self._store.paused() is not None
        async for page in self._actions.cluster.connections():
            report.connections += len(page)
            to_close += self._compare(page, await self._certificates(page), report)
        try:
            if not paused:
                await self._close(to_close, report)
        except Paused:
            paused = True
        await self._sweep_sessions(report, report_only=paused)
        report.duration_s = time.monotonic() - begin
        self._observer.swept(self._actions.name, report)
        if report.entries:
            log.warning(
                "sweep.found",
                cluster=self._actions.name,
                connections=report.connections,
                found=report.nonzero(),
                ended=dict(report.ended),
            )
        return report

    async def _certificates(self, page: Iterable[LiveConnection]) -> CertificatesOnRecord:
        """Read the recorded certificates that connections may use: by serial number, or by name if none is reported."""
        serials: set[str] = set()
        names: set[str] = set()
        for connection in page:
            if number := live_serial(connection):
                serials.add(number)
            else:
                names |= shown_names(connection)
        return CertificatesOnRecord(await self._store.certificates_on_record(sorted(serials), sorted(names)))

    def _compare(
        self, page: Iterable[LiveConnection], certificates: CertificatesOnRecord, report: Report
    ) -> list[tuple[str, LiveConnection]]:
        """Report the connections that are not allowed; return those to close, each with its cause."""
        to_close = []
        with self._registry as registry:
            _require_fresh_copy(registry)
            checker = Checker(registry, registry.now, self._decisions)
            for connection in page:
                cause, why = connection_fault(checker, registry, connection, certificates)
                if cause is not None:
                    facts = {"user": connection.user, "client_id": connection.client_id, "node": connection.node}
                    report.add(cause, **facts, connection=connection.name, why=why)
                    if cause in self._settings.closes or cause == CERTIFICATE_UNKNOWN:  # the device type demands this
                        to_close.append((cause, connection))
                if cause in (None, INCOMPLETE_FACTS) and (claim := contradiction(registry, connection)):
                    report.add(PROPERTY_CONTRADICTS, user=connection.user, node=connection.node, why=claim)
        return to_close

    async def _close(self, to_close: list[tuple[str, LiveConnection]], report: Report) -> None:
        for cause, connection in to_close:
            if await self._actions.close_connection(connection.name):  # False: it ended by itself since it was listed
                report.ended[cause] += 1

    async def _sweep_sessions(self, report: Report, *, report_only: bool) -> None:
        """Report the sessions that nobody may have, and delete them if the settings say so."""
        sessions = await self._actions.sessions()
        report.sessions = len(sessions)
        without_owner: list[SessionQueue] = []
        with self._registry as registry:
            _require_fresh_copy(registry)
            checker = Checker(registry, registry.now, self._decisions)
            for session in sessions:
                if why := checker.session(session):
                    report.add(SESSION_WITHOUT_OWNER, queue=session.queue.name, vhost=session.queue.vhost, why=str(why))
                    without_owner.append(session)
        if SESSION_WITHOUT_OWNER in self._settings.closes and not report_only:
            with contextlib.suppress(Paused):
                for session in without_owner:
                    await self._actions.repair_session(Violation(session, SESSION_WITHOUT_OWNER), Actions())
                    report.ended[SESSION_WITHOUT_OWNER] += 1


def _require_fresh_copy(registry: Registry) -> None:
    """
    Refuse to sweep by a copy of the registry that may be outdated: it would end, or pass, the wrong connections.

    Raises:
        Unavailable: The copy is too old.
    """
    if registry.age_s > _OLDEST_COPY_S:
        raise Unavailable(f"the copy of the registry is {registry.age_s:.0f} s old: nothing was compared with it")


def connection_fault(
    checker: Checker, registry: Registry, connection: LiveConnection, certificates: CertificatesOnRecord
) -> tuple[str | None, str | None]:
    """
    Return why a live connection is not allowed, as cause and explanation; (None, None) if it is allowed.

    A violation beyond doubt comes before incomplete facts.
    """
    device = registry.device_by_name(connection.user)
    reason = checker.connection(connection)
    if reason is Reason.UNKNOWN_IDENTITY:
        return UNKNOWN_IDENTITY, None
    if reason in _CLIENT_ID_REASONS:
        return WRONG_CLIENT_ID, str(reason)
    if reason is not None:
        return (DEVICE_NOT_PERMITTED if device else ACCOUNT_NOT_PERMITTED), str(reason)
    must_be_known = device is not None and _must_be_known(registry, device)
    cause, why = _certificate_fault(connection, certificates.possible(connection), must_be_known)
    if cause not in (None, INCOMPLETE_FACTS):
        return cause, why
    if device is not None and connection.certificate_subject is not None:
        name = common_name(connection.certificate_subject)
        if name and name != connection.user:
            return NAME_NOT_OF_CERTIFICATE, f"the certificate's common name is {name[:128]!r}"
        if name is None:
            cause, why = INCOMPLETE_FACTS, "unknown: the common name of its certificate"
    if missing := checker.missing_facts(connection):
        return INCOMPLETE_FACTS, f"not reported: {', '.join(missing)}"
    return cause, why


def _must_be_known(registry: Registry, device: Device) -> bool:
    device_type = registry.device_type(device.type)
    return device_type is not None and device_type.require_known_certificate


def _certificate_fault(
    connection: LiveConnection, possible: list[Mapping[str, Any]], must_be_known: bool
) -> tuple[str | None, str | None]:
    """
    Return the cause and the reason if a connection's certificate is not allowed.

    Args:
        possible: The recorded certificates that it may be.
        must_be_known: Whether it must be on record.
    """
    uses = {
        state: [shows_certificate(connection, each) for each in possible if each["state"] == state] for state in _STATES
    }
    number = live_serial(connection)
    if True in uses["revoked"]:
        return CERTIFICATE_REVOKED, f"serial {number}"
    doubt = None
    if None in uses["revoked"] and True not in uses["active"]:
        doubt = "unknown: whether its certificate is revoked"
    if must_be_known:
        if number is None:
            return INCOMPLETE_FACTS, "not reported: serial number of its certificate"
        as_recorded = [shows_as_recorded(connection, each) for each in possible]
        if not any(as_recorded):
            if None not in as_recorded:
                return CERTIFICATE_UNKNOWN, _difference_from_record(connection, number, True in uses["active"])
            doubt = "unknown: whether its certificate is the one on record"
    return (INCOMPLETE_FACTS, doubt) if doubt else (None, None)


def _difference_from_record(connection: LiveConnection, number: str, on_record: bool) -> str:
    if on_record:
        return f"serial {number} is on record with another subject or validity"
    return f"serial {number} of {(connection.certificate_issuer or '')[:256]!r} is not on record"
