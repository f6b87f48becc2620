"""
Compare a live connection, a session queue, a binding or a certificate with the registry. Pure.

Violations are named by the reasons that ``policy.decide`` would give if RabbitMQ asked again now. Uses ``policy`` and
the types of ``management_api``; no I/O.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any, Protocol

from authbackend.enforcement.distinguished_names import common_name, same_name
from authbackend.enforcement.management_api import Binding, LiveConnection, Queue
from authbackend.policy import client_ids, decide, lookups
from authbackend.policy.decide import DecisionSettings
from authbackend.policy.model import Account, Device
from authbackend.policy.names import client_id_fits
from authbackend.policy.reasons import Reason
from authbackend.policy.requests import TopicRequest, VhostRequest
from authbackend.policy.topics import contains, split, to_routing_key

SESSION_QUEUES = "^mqtt-(subscription|will)-"
_QUEUE = re.compile(r"mqtt-(?:subscription-(?P<session>.*)qos[01]|will-(?P<will>.*))", re.DOTALL)
_NOT_FAULTS = (Reason.ALLOWED, Reason.ENFORCEMENT_IN_PROGRESS, Reason.REGISTRY_STALE)
_ATTRIBUTE = re.compile(r"\{attr\.")
_SERIAL = re.compile(r"0|-?[1-9a-f][0-9a-f]*")


class Registry(lookups.Registry, Protocol):
    """The lookups that decisions use, all accounts (there are few), and the time."""

    @property
    def now(self) -> float:
        """The database's clock, seconds since the epoch."""

    def accounts(self) -> Iterator[Account]:
        """Yield the accounts."""


@dataclass(frozen=True, slots=True)
class SessionQueue:
    """
    A queue of an MQTT session, recognised by its name.

    RabbitMQ names them ``mqtt-subscription-IDqos0``, ``mqtt-subscription-IDqos1`` and ``mqtt-will-ID``.
    """

    queue: Queue
    client_id: str
    will: bool


def session_queue(queue: Queue) -> SessionQueue | None:
    """Return a queue as that of a session; None if it is another kind of queue."""
    match = _QUEUE.fullmatch(queue.name)
    if match is None:
        return None
    will = match["will"] is not None
    return SessionQueue(queue, match["will"] if will else match["session"], will)


class Checker:
    """
    Checks against one version of the registry.

    Args:
        registry: Must stay at one version while this is in use.
        now: Seconds since the epoch.
    """

    def __init__(self, registry: Registry, now: float, settings: DecisionSettings) -> None:
        self.registry = registry
        self._now = now
        self._settings = settings
        self._account_by_client_id: dict[str, Account] | None = None

    def device_fault(self, device: Device) -> Reason | None:
        """Return why a device may not be connected at all; neither a hold nor a stale copy is a reason."""
        return self._reason(decide.device_fault(self.registry, device, self._now))

    @property
    def mqtt_exchange(self) -> str:
        """The exchange that MQTT clients publish to."""
        return self._settings.mqtt_exchange

    def permitted(self, user: str) -> bool:
        """Return whether a user may be connected at all."""
        device = self.registry.device_by_name(user)
        if device is None:
            return self.registry.account(user) is not None
        return self.device_fault(device) is None

    def owner(self, client_id: str) -> Device | Account | None:
        """Return the device or account that owns a client id."""
        device = client_ids.owner_of(self.registry, client_id)
        if device is not None:
            return device
        if self._account_by_client_id is None:
            self._account_by_client_id = {
                listed: account for account in self.registry.accounts() for listed in account.client_ids
            }
        return self._account_by_client_id.get(client_id)

    def owner_change(
        self, device_type: str, former_patterns: tuple[str, ...], client_id: str
    ) -> tuple[Device, Device] | None:
        """
        Return the new and the former owner of a client id that passed to a device of a type; None if it did not.

        Args:
            former_patterns: The client id patterns of the type before they were widened.
        """
        owner = client_ids.owner_of(self.registry, client_id)
        if owner is None or owner.type != device_type:
            return None
        former_owner = client_ids.former_owner(self.registry, owner, former_patterns, client_id)
        return None if former_owner is None else (owner, former_owner)

    def is_moving(self, client_id: str) -> bool:
        """Return whether a client id is held because its former owner may still be using it."""
        owner = client_ids.owner_of(self.registry, client_id)
        return owner is not None and client_ids.is_moving(self.registry, owner, client_id, self._now)

    def connection(self, connection: LiveConnection) -> Reason | None:
        """Return why a live connection is certainly not allowed; a fact that is not reported is never the reason."""
        if not connection.user:
            return None
        reason = self._reason(self._connection_fault(connection))
        if reason is Reason.VHOST_NOT_LISTED and not connection.vhost:
            return None
        return None if reason is Reason.ADDRESS_NOT_IN_NETWORKS and not _has_address(connection) else reason

    def _connection_fault(self, connection: LiveConnection) -> decide.Decision | None:
        """
        Return the decision about a login with the connection's facts, or None if they allow it as far as they go.

        A device must have a client id. If that of an MQTT client is not reported, or the protocol is unknown, only
        status, virtual host and address are checked.
        """
        request = VhostRequest(connection.user, connection.vhost, connection.address, connection.client_id)
        device = self.registry.device_by_name(connection.user)
        if device is None or connection.client_id is not None or connection.mqtt is False:
            decision = decide.vhost(self.registry, request, self._now)
            device_type = self.registry.device_type(device.type) if device else None
            if decision.reason is Reason.ENFORCEMENT_IN_PROGRESS and device and device_type:
                return decide.place_fault(device_type, request, device.type)  # a hold must not hide another reason
            return decision
        if fault := decide.device_fault(self.registry, device, self._now):
            return fault
        device_type = self.registry.device_type(device.type)
        return decide.place_fault(device_type, request, device.type) if device_type else None

    def missing_facts(self, connection: LiveConnection) -> list[str]:
        """Return which facts :meth:`connection` would need but RabbitMQ does not report."""
        device = self.registry.device_by_name(connection.user)
        holder = self.registry.device_type(device.type) if device else self.registry.account(connection.user)
        missing = {
            "user": not connection.user,
            "protocol": connection.mqtt is None,
            "client id": connection.mqtt is True and connection.client_id is None,
            "virtual host": not connection.vhost,
            "address": holder is not None and holder.networks is not None and not _has_address(connection),
        }
        return [fact for fact, is_missing in missing.items() if is_missing]

    def session(self, session: SessionQueue) -> Reason | None:
        """Return why a session's queue must be deleted, or None."""
        owner = self.owner(session.client_id)
        if owner is None:
            return Reason.UNKNOWN_IDENTITY
        vhost = session.queue.vhost
        if isinstance(owner, Account):
            return None if vhost in owner.vhosts else Reason.VHOST_NOT_LISTED
        if reason := self.device_fault(owner):
            return reason
        device_type = self.registry.device_type(owner.type)
        if device_type is None or vhost not in device_type.vhosts:
            return Reason.VHOST_NOT_LISTED
        return client_ids.client_id_fault(self.registry, owner, device_type, session.client_id)

    def binding(self, session: SessionQueue, binding: Binding) -> Reason | None:
        """Return why a subscription of a session is not allowed, or None."""
        owner = self.owner(session.client_id)
        if owner is None:
            return Reason.UNKNOWN_IDENTITY
        user = owner.common_name if isinstance(owner, Device) else owner.name
        vhost, client_id = session.queue.vhost, session.client_id
        request = TopicRequest(user, vhost, binding.source, "read", binding.routing_key, client_id)
        return self._reason(decide.topic(self.registry, request, self._now, self._settings))

    @staticmethod
    def _reason(decision: decide.Decision | None) -> Reason | None:
        return None if decision is None or decision.reason in _NOT_FAULTS else decision.reason


def _has_address(connection: LiveConnection) -> bool:
    try:
        ip_address(connection.address)
    except ValueError:
        return False
    return True


def narrowed_actions(
    rules: list[dict[str, Any]], allow_rules: list[tuple[str, str, str | None]], mqtt_exchange: str
) -> set[str]:
    """
    Return which of ``publish`` and ``subscribe`` a change of rules narrowed.

    A new deny rule always narrows. A removed allow rule narrows unless another on the same exchange allows as much.

    Args:
        rules: The deny rules that were added and the allow rules that were removed: ``effect``, ``action``, ``topic``,
            and ``exchange`` if it is not that of MQTT.
        allow_rules: Action, filter and exchange of the allow rules that the same owner has now.
    """
    current = [(action, exchange or mqtt_exchange, _words(topic)) for action, topic, exchange in allow_rules]
    narrowed = set()
    for rule in rules:
        action, exchange, words = rule["action"], rule.get("exchange") or mqtt_exchange, _words(rule["topic"])
        covered = any(
            (other_action, other_exchange) == (action, exchange) and contains(outer, words)
            for other_action, other_exchange, outer in current
        )
        if rule["effect"] == "deny" or not covered:
            narrowed.add(action)
    return narrowed


def _words(topic: str) -> list[str]:
    """Return a filter as routing key words; the dot in ``{attr.NAME}`` must not split a placeholder into two words."""
    return split(to_routing_key(_ATTRIBUTE.sub("{attr:", topic)))


def fits(client_id: str, device_id: str, patterns: list[str] | None) -> bool:
    """Return whether a client id belonged to a device under its type's former patterns."""
    return client_id == device_id or client_id_fits(client_id, device_id, tuple(patterns or ()))


def contradiction(registry: Registry, connection: LiveConnection) -> str | None:
    """Return the first MQTT 5 user property of a device's client that differs from the registry, or None."""
    device = registry.device_by_name(connection.user)
    if device is None:
        return None
    claimed = connection.user_properties
    for name, registered in (("client_type", (device.type,)), ("client_name", (device.device_id, device.common_name))):
        if name in claimed and claimed[name] not in registered:
            return f"{name} {claimed[name][:64]!r}, registered: {registered[0]!r}"
    return None


def serial(text: str) -> str:
    """Return a serial number in the registry's notation: lower-case hexadecimal without colons and leading zeros."""
    sign = "-" if text.startswith("-") else ""
    return sign + (text.removeprefix("-").replace(":", "").lower().lstrip("0") or "0")


class CertificatesOnRecord:
    """
    The recorded certificates among which those of live connections are looked up.

    Args:
        records: ``serial``, ``issuer``, ``subject``, ``common_name``, ``not_before``, ``not_after`` and ``state`` of
            each certificate.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        self._by_serial: dict[str, list[Mapping[str, Any]]] = {}
        self._revoked_by_name: dict[str, list[Mapping[str, Any]]] = {}
        for record in records:
            self._by_serial.setdefault(record["serial"], []).append(record)
            if record["state"] == "revoked":
                self._revoked_by_name.setdefault(record["common_name"], []).append(record)

    def possible(self, connection: LiveConnection) -> list[Mapping[str, Any]]:
        """
        Return the certificates that a connection may be using.

        Those with its serial number; if none is reported, the revoked ones with a common name that it may have.
        """
        if number := live_serial(connection):
            return self._by_serial.get(number, [])
        return [each for name in shown_names(connection) for each in self._revoked_by_name.get(name, [])]


def shown_names(connection: LiveConnection) -> set[str]:
    """Return the common names that a connection's certificate may have; none if it has no certificate."""
    if connection.certificate_subject is None:
        return set()
    return {connection.user, common_name(connection.certificate_subject) or connection.user}


def live_serial(connection: LiveConnection) -> str | None:
    """Return the serial number of a connection's certificate in the registry's notation; None if it is not reported."""
    number = serial(connection.certificate_serial or "-")
    return number if _SERIAL.fullmatch(number) else None


def shows_certificate(connection: LiveConnection, record: Mapping[str, Any]) -> bool | None:
    """
    Return whether a connection uses the certificate of a record; None if that is unknown.

    A certificate is identified by issuer and serial number, as in a CRL. If one of them is not reported (RabbitMQ
    before 4.2.7 reports no serial number), a different subject or validity still proves that it is another one.

    Args:
        record: ``serial``, ``issuer``, ``subject``, and ``not_before`` and ``not_after`` as times or ISO 8601.
    """
    identity = _every(_same_serial(connection, record), same_name(connection.certificate_issuer, record["issuer"]))
    if identity is None and _same_subject_and_validity(connection, record) is False:
        return False
    return identity


def shows_as_recorded(connection: LiveConnection, record: Mapping[str, Any]) -> bool | None:
    """Return whether everything reported of a connection's certificate equals its record; None if that is unknown."""
    return _every(shows_certificate(connection, record), _same_subject_and_validity(connection, record))


def _same_serial(connection: LiveConnection, record: Mapping[str, Any]) -> bool | None:
    number = live_serial(connection)
    return None if number is None else number == serial(record["serial"])


def _same_subject_and_validity(connection: LiveConnection, record: Mapping[str, Any]) -> bool | None:
    reported = (connection.certificate_validity or "").split(" - ")
    times = [_same_time(text, record[name]) for text, name in zip(reported, ("not_before", "not_after"), strict=False)]
    return _every(
        same_name(connection.certificate_subject, record["subject"]), *(times if len(reported) == 2 else [None])
    )


def _same_time(reported: str, recorded: datetime | str) -> bool | None:
    """Compare two times to the second; RabbitMQ writes the year 2075 for 1975 as a UTCTime."""
    try:
        broker_time = datetime.fromisoformat(reported)
        registry_time = datetime.fromisoformat(recorded) if isinstance(recorded, str) else recorded
    except ValueError:
        return None
    if broker_time.tzinfo is None or registry_time.tzinfo is None:
        return None
    broker_time, registry_time = (each.astimezone(UTC).replace(microsecond=0) for each in (broker_time, registry_time))
    return registry_time == broker_time or (
        broker_time.year >= 2050 and registry_time == broker_time.replace(year=broker_time.year - 100)
    )


def _every(*answers: bool | None) -> bool | None:
    """Return False if any answer is; else None, for unknown, if any is; else True."""
    if False in answers:
        return False
    return None if None in answers else True
