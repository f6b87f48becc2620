"""
What is wrong with a live connection, a session's queue or a binding, by the registry as it is now. Pure.

The answers are the reasons of ``policy.decide``, which would be given if RabbitMQ asked again.
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
    """The lookups of deciding, all accounts (few), and the time of day."""

    @property
    def now(self) -> float:
        """The database's clock, seconds since the epoch."""

    def accounts(self) -> Iterator[Account]:
        """Yield the accounts."""


@dataclass(frozen=True, slots=True)
class SessionQueue:
    """A queue of an MQTT session, read from its name: ``mqtt-subscription-ID`` with ``qos0`` or ``qos1``, ``mqtt-will-ID``."""

    queue: Queue
    client_id: str
    will: bool


def session_queue(queue: Queue) -> SessionQueue | None:
    """Return the session that a queue belongs to, None for any other queue."""
    found = _QUEUE.fullmatch(queue.name)
    if found is None:
        return None
    will = found["will"] is not None
    return SessionQueue(queue, found["will"] if will else found["session"], will)


class Checker:
    """
    Judges by one version of the registry.

    Args:
        registry: Must stay at one version as long as this is used.
        now: Seconds since the epoch.
    """

    def __init__(self, registry: Registry, now: float, settings: DecisionSettings) -> None:
        self.registry = registry
        self._now = now
        self._settings = settings
        self._accounts: dict[str, Account] | None = None

    def ended(self, device: Device | None) -> Reason | None:
        """Return why a device may not be connected at all; a hold and an old copy are no reason."""
        if device is None:
            return Reason.UNKNOWN_IDENTITY
        return self._reason(decide.device_fault(self.registry, device, self._now))

    @property
    def mqtt_exchange(self) -> str:
        """The exchange that MQTT publishes to."""
        return self._settings.mqtt_exchange

    def permitted(self, user: str) -> bool:
        """Return whether a user may be connected at all."""
        device = self.registry.device_by_name(user)
        if device is None:
            return self.registry.account(user) is not None
        return self.ended(device) is None

    def owner(self, client_id: str) -> Device | Account | None:
        """Return whose a client id is."""
        device = client_ids.owner_of(self.registry, client_id)
        if device is not None:
            return device
        if self._accounts is None:
            self._accounts = {c: account for account in self.registry.accounts() for c in account.client_ids}
        return self._accounts.get(client_id)

    def taken_from(self, device_type: str, former: tuple[str, ...], client_id: str) -> tuple[Device, Device] | None:
        """
        Return a device of a type that has gained a client id by wider patterns, and the one that had it; None if nobody had.

        Args:
            former: The patterns of the type before.
        """
        owner = client_ids.owner_of(self.registry, client_id)
        if owner is None or owner.type != device_type:
            return None
        before = client_ids.former_owner(self.registry, owner, former, client_id)
        return None if before is None else (owner, before)

    def is_moving(self, client_id: str) -> bool:
        """Return whether a client id is held, because the device that had it may still use it."""
        owner = client_ids.owner_of(self.registry, client_id)
        return owner is not None and client_ids.is_moving(self.registry, owner, client_id, self._now)

    def connection(self, connection: LiveConnection) -> Reason | None:
        """Return why a live connection certainly should not be there; a fact that is not told is no reason."""
        if not connection.user:
            return None
        reason = self._reason(self._connection_fault(connection))
        if reason is Reason.VHOST_NOT_LISTED and not connection.vhost:
            return None
        return None if reason is Reason.ADDRESS_NOT_IN_NETWORKS and _address_untold(connection) else reason

    def _connection_fault(self, connection: LiveConnection) -> decide.Decision | None:
        request = VhostRequest(connection.user, connection.vhost, connection.address, connection.client_id)
        device = self.registry.device_by_name(connection.user)
        if device is None or connection.client_id is not None or connection.mqtt is False:
            decision = decide.vhost(self.registry, request, self._now)
            device_type = self.registry.device_type(device.type) if device else None
            if decision.reason is Reason.ENFORCEMENT_IN_PROGRESS and device and device_type:
                return decide.place_fault(device_type, request, device.type)  # a hold must not hide what else is wrong
            return decision
        if fault := decide.device_fault(self.registry, device, self._now):
            return fault
        device_type = self.registry.device_type(device.type)
        return decide.place_fault(device_type, request, device.type) if device_type else None

    def untold(self, connection: LiveConnection) -> list[str]:
        """Return which of the facts by which ``connection`` decides are not told."""
        device = self.registry.device_by_name(connection.user)
        holder = self.registry.device_type(device.type) if device else self.registry.account(connection.user)
        facts = {
            "user": not connection.user,
            "protocol": connection.mqtt is None,
            "client id": connection.mqtt is True and connection.client_id is None,
            "virtual host": not connection.vhost,
            "address": holder is not None and holder.networks is not None and _address_untold(connection),
        }
        return [fact for fact, is_untold in facts.items() if is_untold]

    def session(self, session: SessionQueue) -> Reason | None:
        """Return why a session's queue should not be there at all."""
        owner = self.owner(session.client_id)
        if owner is None:
            return Reason.UNKNOWN_IDENTITY
        vhost = session.queue.vhost
        if isinstance(owner, Account):
            return None if vhost in owner.vhosts else Reason.VHOST_NOT_LISTED
        if reason := self.ended(owner):
            return reason
        device_type = self.registry.device_type(owner.type)
        if device_type is None or vhost not in device_type.vhosts:
            return Reason.VHOST_NOT_LISTED
        return client_ids.client_id_fault(self.registry, owner, device_type, session.client_id)

    def binding(self, session: SessionQueue, binding: Binding) -> Reason | None:
        """Return why a subscription should not be there; its session itself may be."""
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


def _address_untold(connection: LiveConnection) -> bool:
    try:
        ip_address(connection.address)
    except ValueError:
        return True
    return False


def narrowed_actions(
    rules: list[dict[str, Any]], present: list[tuple[str, str, str | None]], mqtt_exchange: str
) -> set[str]:
    """
    Return which of ``publish`` and ``subscribe`` a change of rules narrowed.

    A new deny rule narrows; an allow rule that is gone does unless one on the same exchange allows as much.

    Args:
        rules: The deny rules that came and the allow rules that went: ``effect``, ``action``, ``topic``, and
            ``exchange`` where it is not the one of MQTT.
        present: Action, filter and exchange of the allow rules that the same owner has now.
    """
    kept = [(action, exchange or mqtt_exchange, _words(topic)) for action, topic, exchange in present]
    found = set()
    for rule in rules:
        words = _words(rule["topic"])
        where = (rule["action"], rule.get("exchange") or mqtt_exchange)
        if rule["effect"] == "deny" or not any(
            (action, exchange) == where and contains(outer, words) for action, exchange, outer in kept
        ):
            found.add(rule["action"])
    return found


def _words(topic: str) -> list[str]:
    return split(to_routing_key(_ATTRIBUTE.sub("{attr:", topic)))  # a placeholder is one word


def fits(client_id: str, device_id: str, patterns: list[str] | None) -> bool:
    """Return whether a client id was a device's by patterns that may not be there any more."""
    return client_id == device_id or client_id_fits(client_id, device_id, tuple(patterns or ()))


def contradiction(registry: Registry, connection: LiveConnection) -> str | None:
    """Return what a client says of itself in MQTT 5 user properties that the registry does not."""
    device = registry.device_by_name(connection.user)
    if device is None:
        return None
    claimed = connection.user_properties
    for name, true in (("client_type", (device.type,)), ("client_name", (device.device_id, device.common_name))):
        if name in claimed and claimed[name] not in true:
            return f"{name} {claimed[name][:64]!r}, registered: {true[0]!r}"
    return None


def serial(text: str) -> str:
    """Return a certificate's serial number as the registry writes it: lower-case hexadecimal without leading zeros."""
    sign = "-" if text.startswith("-") else ""
    return sign + (text.removeprefix("-").replace(":", "").lower().lstrip("0") or "0")


class CertificatesOnRecord:
    """
    The certificates that live connections may show.

    Args:
        records: ``serial``, ``issuer``, ``subject``, ``common_name``, ``not_before``, ``not_after`` and ``state`` of
            each.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        self._by_serial: dict[str, list[Mapping[str, Any]]] = {}
        self._revoked_by_name: dict[str, list[Mapping[str, Any]]] = {}
        for record in records:
            self._by_serial.setdefault(record["serial"], []).append(record)
            if record["state"] == "revoked":
                self._revoked_by_name.setdefault(record["common_name"], []).append(record)

    def possible(self, connection: LiveConnection) -> list[Mapping[str, Any]]:
        """Return those that a connection may show: by serial number, or the revoked ones of its names if none is told."""
        if number := live_serial(connection):
            return self._by_serial.get(number, [])
        return [each for name in shown_names(connection) for each in self._revoked_by_name.get(name, [])]


def shown_names(connection: LiveConnection) -> set[str]:
    """Return the common names that a connection's certificate may have; none if it certainly shows none."""
    if connection.certificate_subject is None:
        return set()
    return {connection.user, common_name(connection.certificate_subject) or connection.user}


def live_serial(connection: LiveConnection) -> str | None:
    """Return the serial number that a connection shows, as the registry writes it; None if it is not told."""
    number = serial(connection.certificate_serial or "-")
    return number if _SERIAL.fullmatch(number) else None


def shows_certificate(connection: LiveConnection, record: Mapping[str, Any]) -> bool | None:
    """
    Return whether a connection shows the certificate of a record; None if that is not known.

    A certificate is its issuer and its serial number, as on a revocation list. Where one of them is not told (RabbitMQ
    before 4.2.7 tells no serial number), another subject or validity still says that it is not this one.

    Args:
        record: ``serial``, ``issuer``, ``subject``, and ``not_before`` and ``not_after`` as times or ISO 8601.
    """
    identity = _every(_same_serial(connection, record), same_name(connection.certificate_issuer, record["issuer"]))
    if identity is None and _same_subject_and_validity(connection, record) is False:
        return False
    return identity


def shows_as_recorded(connection: LiveConnection, record: Mapping[str, Any]) -> bool | None:
    """Return whether all that a connection shows of its certificate is as recorded; None if that is not known."""
    return _every(shows_certificate(connection, record), _same_subject_and_validity(connection, record))


def _same_serial(connection: LiveConnection, record: Mapping[str, Any]) -> bool | None:
    number = live_serial(connection)
    return None if number is None else number == serial(record["serial"])


def _same_subject_and_validity(connection: LiveConnection, record: Mapping[str, Any]) -> bool | None:
    shown = (connection.certificate_validity or "").split(" - ")
    times = [_same_time(text, record[name]) for text, name in zip(shown, ("not_before", "not_after"), strict=False)]
    return _every(same_name(connection.certificate_subject, record["subject"]), *(times if len(shown) == 2 else [None]))


def _same_time(shown: str, recorded: datetime | str) -> bool | None:
    """Compare to the second; RabbitMQ writes 2075 for the UTCTime of 1975."""
    try:
        there = datetime.fromisoformat(shown)
        here = datetime.fromisoformat(recorded) if isinstance(recorded, str) else recorded
    except ValueError:
        return None
    if there.tzinfo is None or here.tzinfo is None:
        return None
    there, here = (each.astimezone(UTC).replace(microsecond=0) for each in (there, here))
    return here == there or (there.year >= 2050 and here == there.replace(year=there.year - 100))


def _every(*answers: bool | None) -> bool | None:
    if False in answers:
        return False
    return None if None in answers else True
