"""
The sweep: compares what is connected, and which sessions there are, with the registry, for ever.

It finds what no change could have told: a race, a restore, a broker that asked somebody else, a certificate that is not
the user's. What it finds is reported, and by setting ended.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog

from authbackend.enforcement.checks import Checker, Registry, SessionQueue, common_name, contradiction, serial
from authbackend.enforcement.clusters import Actions, ClusterActions, Violation
from authbackend.enforcement.management_api import LiveConnection
from authbackend.enforcement.tasks import TaskStore, TaskStoreError
from authbackend.errors import AuthbackendError, Unavailable
from authbackend.policy.decide import DecisionSettings
from authbackend.policy.reasons import Reason
from authbackend.policy.rules import Device
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
CAUSES = (
    *(UNKNOWN_IDENTITY, DEVICE_NOT_PERMITTED, ACCOUNT_NOT_PERMITTED, WRONG_CLIENT_ID, NAME_NOT_OF_CERTIFICATE),
    *(CERTIFICATE_REVOKED, CERTIFICATE_UNKNOWN, SESSION_WITHOUT_OWNER, PROPERTY_CONTRADICTS),
)
"""What a sweep can find; the last one is reported only."""

_CLIENT_ID_REASONS = (Reason.CLIENT_ID_NOT_BOUND, Reason.CLIENT_ID_OF_ANOTHER_DEVICE)
_REPORTED = 200
_OLDEST_COPY_S = 30.0


class Observer(Protocol):
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
        observer: Observer,
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
                await self._store.keep_sweep(name, report.as_dict())
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
            serials = {serial(each.certificate_serial) for each in page if each.certificate_serial}
            states = await self._store.certificate_states(sorted(serials))
            closing += self._compare(page, states, report)
        if not paused:
            await self._close(closing, report)
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

    def _compare(
        self, page: Iterable[LiveConnection], states: dict[str, str], report: Report
    ) -> list[tuple[str, LiveConnection]]:
        closing = []
        with self._registry as registry:
            _demand_fresh(registry)
            checker = Checker(registry, time.time(), self._decisions)
            for connection in page:
                cause, why = connection_fault(checker, registry, connection, states)
                if cause is not None:
                    facts = {"user": connection.user, "client_id": connection.client_id, "node": connection.node}
                    report.note(cause, **facts, connection=connection.name, why=why)
                    if cause in self._settings.closes or cause == CERTIFICATE_UNKNOWN:  # which its type demands
                        closing.append((cause, connection))
                elif claim := contradiction(registry, connection):
                    report.note(PROPERTY_CONTRADICTS, user=connection.user, node=connection.node, why=claim)
        return closing

    async def _close(self, closing: list[tuple[str, LiveConnection]], report: Report) -> None:
        for cause, connection in closing:
            await self._actions.close_connection(connection.name)
            report.ended[cause] += 1

    async def _sessions(self, report: Report, *, report_only: bool) -> None:
        sessions = await self._actions.sessions()
        report.sessions = len(sessions)
        ending: list[SessionQueue] = []
        with self._registry as registry:
            _demand_fresh(registry)
            checker = Checker(registry, time.time(), self._decisions)
            for session in sessions:
                if why := checker.session(session):
                    report.note(
                        SESSION_WITHOUT_OWNER, queue=session.queue.name, vhost=session.queue.vhost, why=str(why)
                    )
                    ending.append(session)
        if SESSION_WITHOUT_OWNER in self._settings.closes and not report_only:
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
    checker: Checker, registry: Registry, connection: LiveConnection, states: dict[str, str]
) -> tuple[str | None, str | None]:
    """Return the cause for which a live connection should not be there, and why; None twice if it may."""
    device = registry.device_by_name(connection.user)
    reason = checker.connection(connection)
    if reason is Reason.UNKNOWN_IDENTITY:
        return UNKNOWN_IDENTITY, None
    if reason in _CLIENT_ID_REASONS:
        return WRONG_CLIENT_ID, str(reason)
    if reason is not None:
        return (DEVICE_NOT_PERMITTED if device else ACCOUNT_NOT_PERMITTED), str(reason)
    if connection.certificate_serial:
        shown = serial(connection.certificate_serial)
        state = states.get(shown)
        if state == "revoked":
            return CERTIFICATE_REVOKED, f"serial {shown}"
        if state is None and device is not None and _must_be_known(registry, device):
            return CERTIFICATE_UNKNOWN, f"serial {shown}"
    return _certificate_fault(device, connection)


def _must_be_known(registry: Registry, device: Device) -> bool:
    device_type = registry.device_type(device.type)
    return device_type is not None and device_type.require_known_certificate


def _certificate_fault(device: Device | None, connection: LiveConnection) -> tuple[str | None, str | None]:
    if device is None or connection.certificate_subject is None:
        return None, None
    named = common_name(connection.certificate_subject)
    if named is not None and named != connection.user:
        return NAME_NOT_OF_CERTIFICATE, f"the certificate is that of {named[:128]!r}"
    return None, None
