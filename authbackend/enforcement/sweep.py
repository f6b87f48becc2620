"""
The sweep: compares what is connected, and which sessions there are, with the registry, for ever.

It finds what no change could have told: a race, a restore, a broker that asked somebody else, a certificate that is not
the user's. What it finds is reported, and by setting ended.
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
"""What a sweep can find; the last two are reported only."""

_CLIENT_ID_REASONS = (Reason.CLIENT_ID_NOT_BOUND, Reason.CLIENT_ID_OF_ANOTHER_DEVICE)
_STATES = ("active", "revoked")
_REPORTED = 200
_REPORTED_INCOMPLETE = 50
"""Where a broker tells too little of everybody, what is certain still has room in the report."""

_OLDEST_COPY_S = 30.0


class SweepObserver(Protocol):
    """Is told what a sweep found, for metrics."""

    def swept(self, cluster: str, report: Report) -> None:
        """A cluster was compared."""

    def sweep_failed(self) -> None:
        """A sweep could not be done."""


@dataclass
class Report:
    """
    What one sweep of a cluster found.

    Args:
        found: By cause.
        ended: By cause, those that were closed or deleted.
        entries: The first ones, for people.
    """

    connections: int = 0
    sessions: int = 0
    duration_s: float = 0.0
    found: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(CAUSES, 0)))
    ended: Counter[str] = field(default_factory=Counter)
    entries: list[dict[str, Any]] = field(default_factory=list)

    def note(self, cause: str, **facts: Any) -> None:
        """Add a finding."""
        self.found[cause] += 1
        if cause == INCOMPLETE_FACTS and self.found[cause] > _REPORTED_INCOMPLETE:
            return
        if len(self.entries) < _REPORTED:
            self.entries.append({"cause": cause, **{k: v for k, v in facts.items() if v is not None}})

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "connections": self.connections,
            "sessions": self.sessions,
            "duration_s": round(self.duration_s, 3),
            "found": {cause: number for cause, number in self.found.items() if number},
            "ended": dict(self.ended),
            "entries": self.entries,
        }


@dataclass(frozen=True, slots=True)
class SweepSettings:
    """
    How to sweep.

    Args:
        closes: The causes for which something is ended.
    """

    interval_s: float
    closes: frozenset[str]


class Sweep:
    """Sweeps one cluster regularly; while enforcement is paused, it reports and ends nothing."""

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
        Compare the cluster with the registry.

        Raises:
            Unavailable: It does not answer, or the copy of the registry is too old to checker by.
        """
        begin = time.monotonic()
        report = Report()
        closing: list[tuple[str, LiveConnection]] = []
        paused = await self._store.paused() is not None
        async for page in self._actions.cluster.connections():
            report.connections += len(page)
            closing += self._compare(page, await self._certificates(page), report)
        try:
            if not paused:
                await self._close(closing, report)
        except Paused:
            paused = True
        await self._sessions(report, report_only=paused)
        report.duration_s = time.monotonic() - begin
        self._observer.swept(self._actions.name, report)
        if closing or report.entries:
            found = {cause: number for cause, number in report.found.items() if number}
            log.warning(
                "sweep.found",
                cluster=self._actions.name,
                connections=report.connections,
                found=found,
                ended=dict(report.ended),
            )
        return report

    async def _certificates(self, page: Iterable[LiveConnection]) -> CertificatesOnRecord:
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
        closing = []
        with self._registry as registry:
            _demand_fresh(registry)
            checker = Checker(registry, registry.now, self._decisions)
            for connection in page:
                cause, why = connection_fault(checker, registry, connection, certificates)
                if cause is not None:
                    facts = {"user": connection.user, "client_id": connection.client_id, "node": connection.node}
                    report.note(cause, **facts, connection=connection.name, why=why)
                    if cause in self._settings.closes or cause == CERTIFICATE_UNKNOWN:  # which its type demands
                        closing.append((cause, connection))
                if cause in (None, INCOMPLETE_FACTS) and (claim := contradiction(registry, connection)):
                    report.note(PROPERTY_CONTRADICTS, user=connection.user, node=connection.node, why=claim)
        return closing

    async def _close(self, closing: list[tuple[str, LiveConnection]], report: Report) -> None:
        for cause, connection in closing:
            if await self._actions.close_connection(connection.name):  # it may have gone by itself since it was listed
                report.ended[cause] += 1

    async def _sessions(self, report: Report, *, report_only: bool) -> None:
        sessions = await self._actions.sessions()
        report.sessions = len(sessions)
        ending: list[SessionQueue] = []
        with self._registry as registry:
            _demand_fresh(registry)
            checker = Checker(registry, registry.now, self._decisions)
            for session in sessions:
                if why := checker.session(session):
                    report.note(
                        SESSION_WITHOUT_OWNER, queue=session.queue.name, vhost=session.queue.vhost, why=str(why)
                    )
                    ending.append(session)
        if SESSION_WITHOUT_OWNER in self._settings.closes and not report_only:
            with contextlib.suppress(Paused):
                for session in ending:
                    await self._actions.repair_session(Violation(session, SESSION_WITHOUT_OWNER), Actions())
                    report.ended[SESSION_WITHOUT_OWNER] += 1


def _demand_fresh(registry: Registry) -> None:
    """
    Let nothing be ended, or be told to be in order, by what is not known to be true now.

    Raises:
        Unavailable: The copy is too old.
    """
    if registry.age_s > _OLDEST_COPY_S:
        raise Unavailable(f"the copy of the registry is {registry.age_s:.0f} s old: nothing was compared with it")


def connection_fault(
    checker: Checker, registry: Registry, connection: LiveConnection, certificates: CertificatesOnRecord
) -> tuple[str | None, str | None]:
    """
    Return the cause for which a live connection should not be there, and why; None twice if it may.

    What is certain goes before what is not known.
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
        named = common_name(connection.certificate_subject)
        if named and named != connection.user:
            return NAME_NOT_OF_CERTIFICATE, f"the certificate is that of {named[:128]!r}"
        if named is None:
            cause, why = INCOMPLETE_FACTS, "not known: the common name of its certificate"
    if untold := checker.untold(connection):
        return INCOMPLETE_FACTS, f"not told: {', '.join(untold)}"
    return cause, why


def _must_be_known(registry: Registry, device: Device) -> bool:
    device_type = registry.device_type(device.type)
    return device_type is not None and device_type.require_known_certificate


def _certificate_fault(
    connection: LiveConnection, possible: list[Mapping[str, Any]], must_be_known: bool
) -> tuple[str | None, str | None]:
    """Return what is wrong with the certificate that a connection shows, among those that it may be."""
    shown = {
        state: [shows_certificate(connection, each) for each in possible if each["state"] == state] for state in _STATES
    }
    number = live_serial(connection)
    if True in shown["revoked"]:
        return CERTIFICATE_REVOKED, f"serial {number}"
    doubt = None
    if None in shown["revoked"] and True not in shown["active"]:
        doubt = "not known: whether its certificate is one that is revoked"
    if must_be_known:
        if number is None:
            return INCOMPLETE_FACTS, "not told: serial number of its certificate"
        recorded = [shows_as_recorded(connection, each) for each in possible]
        if not any(recorded):
            if None not in recorded:
                return CERTIFICATE_UNKNOWN, _unlike_record(connection, number, True in shown["active"])
            doubt = "not known: whether its certificate is the one on record"
    return (INCOMPLETE_FACTS, doubt) if doubt else (None, None)


def _unlike_record(connection: LiveConnection, number: str, on_record: bool) -> str:
    if on_record:
        return f"serial {number} is on record with another subject or validity"
    return f"serial {number} of {(connection.certificate_issuer or '')[:256]!r} is not on record"
