"""
Decide RabbitMQ's four kinds of request from memory: login, vhost, resource, topic.

Each answer is a :class:`Decision`; the default is deny. A device that is not active is denied all four, a client id
is checked wherever a request carries one, and nothing here reads a clock: ``now`` is passed in.

Source: rabbitmq_auth_backend_http and the MQTT plugin as observed on RabbitMQ 3.10.8, 4.0.5 and 4.3.6.
"""

from __future__ import annotations

from dataclasses import dataclass

from authbackend.policy.client_ids import account_client_id_fault, client_id_fault, is_moving
from authbackend.policy.lookups import Registry
from authbackend.policy.model import (
    DEFAULT_EXCHANGE,
    NO_RULES,
    Account,
    Device,
    DeviceType,
    Login,
    RuleSet,
    Status,
    resource_matches,
)
from authbackend.policy.reasons import Reason
from authbackend.policy.requests import LoginRequest, ResourceRequest, TopicRequest, VhostRequest
from authbackend.policy.rules import Effect, Permission, TopicRule, Values
from authbackend.policy.topics import MOST_MANY_IN_A_FILTER, MOST_WORDS_WITH_MANY, Words, split

_TOPIC_PERMISSIONS = {str(permission): permission for permission in Permission}
ACCOUNT = "account"
UNKNOWN = "unknown"


@dataclass(slots=True)
class Decision:
    """
    A verdict and its reason. Not frozen, for the same reason as ``Device``.

    Args:
        rule: The topic rule that decided, if one did.
        tags: RabbitMQ user tags; only set when an account's login is allowed.
        kind: The device's type, ``account`` or ``unknown``; used as a metric label, so it has few values.
    """

    allowed: bool
    reason: Reason
    kind: str = UNKNOWN
    rule: TopicRule | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PasswordCheck:
    """
    A verdict that depends on a password.

    Args:
        account: None for an unknown name: the password check costs the same, and the answer is ``otherwise``.
        then: The decision if the password is right.
        otherwise: The decision if it is wrong.
    """

    account: Account | None
    then: Decision
    otherwise: Decision


@dataclass(frozen=True, slots=True)
class DecisionSettings:
    """Settings that decisions depend on."""

    mqtt_exchange: str = "amq.topic"


def login(registry: Registry, request: LoginRequest, now: float) -> Decision | PasswordCheck:
    """Decide a login; the caller checks the password, because that is slow."""
    device = registry.device_by_name(request.username)
    if device is not None:
        if request.password is not None:
            return _deny(Reason.PASSWORD_ON_CERTIFICATE_IDENTITY, device.type)
        return (
            _device_fault(registry, device, now, request.client_id)
            or _hold(registry, device, now, request.client_id)
            or _allow(device.type)
        )
    account = registry.account(request.username)
    if account is None:
        unknown = _deny(Reason.UNKNOWN_IDENTITY, UNKNOWN)
        return unknown if request.password is None else PasswordCheck(None, unknown, unknown)
    return _account_login(registry, account, request)


def _account_login(registry: Registry, account: Account, request: LoginRequest) -> Decision | PasswordCheck:
    fault = account_client_id_fault(registry, account, request.client_id)
    then = _deny(fault, ACCOUNT) if fault else Decision(True, Reason.ALLOWED, ACCOUNT, None, account.tags)
    if account.login is Login.CERTIFICATE:
        if request.password is not None:
            return _deny(Reason.PASSWORD_ON_CERTIFICATE_IDENTITY, ACCOUNT)
        return then
    if request.password is None:
        return _deny(Reason.PASSWORD_MISSING, ACCOUNT)
    return PasswordCheck(account, then, _deny(Reason.PASSWORD_WRONG, ACCOUNT))


def vhost(registry: Registry, request: VhostRequest, now: float) -> Decision:
    """Decide access to a virtual host from a client address."""
    device = registry.device_by_name(request.username)
    if device is not None:
        if fault := _mqtt_fault(registry, device, now, request.client_id) or _hold(
            registry, device, now, request.client_id
        ):
            return fault
        holder: DeviceType | Account | None = registry.device_type(device.type)
        kind = device.type
    else:
        holder = registry.account(request.username)
        kind = ACCOUNT
        if isinstance(holder, Account) and (reason := account_client_id_fault(registry, holder, request.client_id)):
            return _deny(reason, ACCOUNT)
    if holder is None:
        return _deny(Reason.UNKNOWN_IDENTITY, UNKNOWN)
    return place_fault(holder, request, kind) or _allow(kind)


def place_fault(holder: DeviceType | Account, request: VhostRequest, kind: str) -> Decision | None:
    """Return why a virtual host or client address is not allowed, or None if both are."""
    if request.vhost not in holder.vhosts:
        return _deny(Reason.VHOST_NOT_LISTED, kind)
    if holder.networks is not None and request.ip not in holder.networks:
        return _deny(Reason.ADDRESS_NOT_IN_NETWORKS, kind)
    return None


def resource(registry: Registry, request: ResourceRequest, now: float, settings: DecisionSettings) -> Decision:
    """Decide access to a queue or exchange."""
    device = registry.device_by_name(request.username)
    if device is not None:
        if fault := _mqtt_fault(registry, device, now, request.client_id, request.vhost):
            return fault
        return _device_resource(registry, device, request, settings)
    account = registry.account(request.username)
    if account is None:
        return _deny(Reason.UNKNOWN_IDENTITY, UNKNOWN)
    if fault := _account_fault(registry, account, request.client_id, request.vhost):
        return fault
    if request.resource not in ("queue", "exchange"):
        return _deny(Reason.RESOURCE_NOT_PERMITTED, ACCOUNT)
    if not _reaches(account, request.permission, request.name):
        return _deny(Reason.RESOURCE_NOT_PERMITTED, ACCOUNT)
    if request.resource == "exchange" and _forwards_unchecked(account, request, settings):
        return _deny(Reason.UNCHECKED_DEAD_LETTERING, ACCOUNT)
    return _allow(ACCOUNT)


def _forwards_unchecked(account: Account, request: ResourceRequest, settings: DecisionSettings) -> bool:
    """
    Return whether a permission on an exchange would let an account bypass the topic rules of another exchange.

    There are two ways: the account's own queue dead-letters to a topic exchange that it may write to; or an exchange
    that it may publish to is bound to such an exchange, which takes write on that one and read on this one. The
    database refuses the first for ``amq.topic`` when the account is saved; here both are refused for any exchange.
    """
    if account.unchecked_dead_lettering:
        return False
    ruled = {settings.mqtt_exchange, *account.rules.exchanges()}
    if request.permission == "write":
        return bool(account.configure) and request.name in ruled
    if request.permission == "read" and _reaches(account, "write", request.name):
        return any(_reaches(account, "write", name) for name in ruled - {request.name})
    return False


def _reaches(account: Account, permission: str, name: str) -> bool:
    return any(resource_matches(pattern, name) for pattern in account.resource_patterns(permission))


def _device_resource(
    registry: Registry, device: Device, request: ResourceRequest, settings: DecisionSettings
) -> Decision:
    """Allow a device exactly what its own MQTT connection needs."""
    client_id = request.client_id
    is_known = request.permission in ("configure", "write", "read")
    if request.resource == "queue":
        own = (
            f"mqtt-subscription-{client_id}qos0",
            f"mqtt-subscription-{client_id}qos1",
            f"mqtt-will-{client_id}",
        )
        if is_known and request.name in own:
            return _allow(device.type)
    elif request.resource == "exchange":
        needed: Permission | None = None
        if request.name == settings.mqtt_exchange and request.permission in ("write", "read"):
            needed = Permission(request.permission)
        elif request.name == DEFAULT_EXCHANGE and request.permission == "write":
            needed = Permission.WRITE  # a delayed will is stored through the default exchange
        if needed is not None:
            return _some_rule_allows(registry, device, request, needed)
    return _deny(Reason.RESOURCE_NOT_PERMITTED, device.type)


def _some_rule_allows(registry: Registry, device: Device, request: ResourceRequest, permission: Permission) -> Decision:
    values = device_values(device, request.client_id, request.vhost)
    for rules in rule_sets(registry, device):
        for rule in rules.allowing(permission):
            if rule.pattern(values) is not None:
                return Decision(True, Reason.ALLOWED, device.type, rule)
    return _deny(Reason.NO_RULE_ALLOWS, device.type)


def topic(registry: Registry, request: TopicRequest, now: float, settings: DecisionSettings) -> Decision:
    """Decide a publish or a subscription."""
    device = registry.device_by_name(request.username)
    if device is not None:
        if fault := _mqtt_fault(registry, device, now, request.client_id, request.vhost):
            return fault
        if request.name != settings.mqtt_exchange:
            return _deny(Reason.EXCHANGE_NOT_PERMITTED, device.type)
        values = device_values(device, request.client_id, request.vhost)
        return by_rules(rule_sets(registry, device), values, request.permission, request.routing_key, device.type)
    account = registry.account(request.username)
    if account is None:
        return _deny(Reason.UNKNOWN_IDENTITY, UNKNOWN)
    if fault := _account_fault(registry, account, request.client_id, request.vhost):
        return fault
    named = account.rules.on_exchange(request.name)
    rule_sets_ = (named, account.rules.on_exchange(None)) if request.name == settings.mqtt_exchange else (named,)
    values = Values({"client_id": request.client_id, "vhost": request.vhost})
    return by_rules(rule_sets_, values, request.permission, request.routing_key, ACCOUNT)


def by_rules(
    rule_sets: tuple[RuleSet, ...], values: Values, permission: str, routing_key: str, kind: str = UNKNOWN
) -> Decision:
    """
    Decide a topic by rules alone: default deny, deny wins, order never matters.

    A single allow rule must contain the whole read filter; two rules that only cover it together are not enough.
    """
    requested = _TOPIC_PERMISSIONS.get(permission)
    if requested is None:
        return _deny(Reason.RESOURCE_NOT_PERMITTED, kind)
    words = Words(split(routing_key))
    if requested is Permission.READ and (
        words.many > MOST_MANY_IN_A_FILTER or (words.many and len(words) > MOST_WORDS_WITH_MANY)
    ):
        return _deny(Reason.TOO_MANY_WILDCARDS, kind)
    for rules in rule_sets:
        allowed_by = rules.first(Effect.ALLOW, requested, values, words)
        if allowed_by is not None:
            break
    else:
        return _deny(Reason.NO_RULE_ALLOWS, kind)
    for rules in rule_sets:
        denied_by = rules.first(Effect.DENY, requested, values, words)
        if denied_by is not None:
            return Decision(False, Reason.RULE_DENIES, kind, denied_by)
    return Decision(True, Reason.ALLOWED, kind, allowed_by)


def rule_sets(registry: Registry, device: Device) -> tuple[RuleSet, ...]:
    """Return the rules that apply to a device: those of its type and its own."""
    device_type = registry.device_type(device.type)
    of_type = device_type.rules if device_type else NO_RULES
    return (of_type,) if device.rules is NO_RULES else (of_type, device.rules)


def device_values(device: Device, client_id: str | None, vhost_name: str) -> Values:
    """Return the placeholder values for a device's request."""
    return Values(
        {
            "device_id": device.device_id,
            "client_id": client_id,
            "device_type": device.type,
            "vhost": vhost_name,
        },
        device.attributes,
    )


def _mqtt_fault(
    registry: Registry, device: Device, now: float, client_id: str | None, vhost_name: str | None = None
) -> Decision | None:
    """
    Return why a device's request after login is denied, or None.

    A request without a client id comes from AMQP, streams or the management API, none of which a device uses.
    """
    if client_id is None:
        fault = _device_fault(registry, device, now, None)
        return fault or _deny(Reason.CLIENT_ID_MISSING, device.type)
    if fault := _device_fault(registry, device, now, client_id):
        return fault
    device_type = registry.device_type(device.type)
    if vhost_name is not None and (device_type is None or vhost_name not in device_type.vhosts):
        return _deny(Reason.VHOST_NOT_LISTED, device.type)
    return None


def _hold(registry: Registry, device: Device, now: float, client_id: str | None) -> Decision | None:
    """
    Return why a device that is otherwise allowed may not log in yet, or None.

    Not checked for existing connections: those are being closed, and the rules decide their last wills.
    """
    if device.held_until is not None and now < device.held_until:
        return _deny(Reason.ENFORCEMENT_IN_PROGRESS, device.type)
    if client_id is not None and is_moving(registry, device, client_id, now):
        return _deny(Reason.ENFORCEMENT_IN_PROGRESS, device.type)
    return None


def device_fault(registry: Registry, device: Device, now: float) -> Decision | None:
    """Return why a device is denied everything, or None if it may log in; holds are ignored."""
    return _device_fault(registry, device, now, None)


def _device_fault(registry: Registry, device: Device, now: float, client_id: str | None) -> Decision | None:
    match device.status:
        case Status.ACTIVE:
            pass
        case Status.PENDING:
            return _deny(Reason.DEVICE_PENDING, device.type)
        case Status.SUSPENDED:
            return _deny(Reason.DEVICE_SUSPENDED, device.type)
        case Status.REVOKED:
            return _deny(Reason.DEVICE_REVOKED, device.type)
    if device.expires_at is not None and now >= device.expires_at:
        return _deny(Reason.DEVICE_EXPIRED, device.type)
    device_type = registry.device_type(device.type)
    if device_type is None:
        return _deny(Reason.DEVICE_TYPE_UNKNOWN, device.type)
    if device_type.max_staleness_s is not None and registry.age_s > device_type.max_staleness_s:
        return _deny(Reason.REGISTRY_STALE, device.type)
    if client_id is None:
        return None
    reason = client_id_fault(registry, device, device_type, client_id)
    return _deny(reason, device.type) if reason else None


def _account_fault(registry: Registry, account: Account, client_id: str | None, vhost_name: str) -> Decision | None:
    if reason := account_client_id_fault(registry, account, client_id):
        return _deny(reason, ACCOUNT)
    if vhost_name not in account.vhosts:
        return _deny(Reason.VHOST_NOT_LISTED, ACCOUNT)
    return None


def _allow(kind: str) -> Decision:
    return Decision(True, Reason.ALLOWED, kind)


def _deny(reason: Reason, kind: str) -> Decision:
    return Decision(False, reason, kind)
