"""
What is wrong with a live connection, a session's queue or a binding, by the registry as it is now. Pure.

The answers are the reasons of ``policy.decide``, which would be given if RabbitMQ asked again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from authbackend.enforcement.management_api import Binding, LiveConnection, Queue
from authbackend.policy import client_ids, decide, lookups
from authbackend.policy.decide import DecisionSettings
from authbackend.policy.names import client_id_fits
from authbackend.policy.reasons import Reason
from authbackend.policy.requests import TopicRequest, VhostRequest
from authbackend.policy.rules import Account, Device
from authbackend.policy.topics import contains, split, to_routing_key

SESSION_QUEUES = "^mqtt-(subscription|will)-"
_QUEUE = re.compile(r"mqtt-(?:subscription-(?P<session>.*)qos[01]|will-(?P<will>.*))", re.DOTALL)
_NOT_FAULTS = (Reason.ALLOWED, Reason.ENFORCEMENT_IN_PROGRESS, Reason.REGISTRY_STALE)
_ATTRIBUTE = re.compile(r"\{attr\.")
_SUBJECT_PART = re.compile(r"((?:[^,\\]|\\.)*)(?:,|$)")


class Registry(lookups.Registry, Protocol):
    """The lookups of deciding, and all accounts: few."""

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
        """Return why a live connection should not be there."""
        request = VhostRequest(connection.user, connection.vhost, connection.address, connection.client_id)
        return self._reason(decide.vhost(self.registry, request, self._now))

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


def common_name(subject: str) -> str | None:
    """
    Return the common name of a subject as RabbitMQ makes a user name of it: several are joined with commas.

    Args:
        subject: RFC 4514, as ``peer_cert_subject`` of the management API.
    """
    parts = [part for part in _SUBJECT_PART.findall(subject) if part]
    names = [re.sub(r"\\(.)", r"\1", part[3:]) for part in parts if part.startswith("CN=")]
    return ",".join(reversed(names)) or None


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
    return text.replace(":", "").lower().lstrip("0") or "0"
